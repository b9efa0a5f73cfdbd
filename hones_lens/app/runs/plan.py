"""Estimate of the cost of a run before it starts, without its model's weights (`--plan`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict, Unpack

from hones_lens.app.runs import stages as pipeline
from hones_lens.app.runs.lengths import Lengths
from hones_lens.app.runs.machines import Machines, duration, memory_of, total_of
from hones_lens.app.runs.operations import Operations
from hones_lens.engine import MAX_NEW_TOKENS, as_task
from hones_lens.hones import RATIOS, default_top_k
from hones_lens.interventions import Heads, Layers, choose_heads, choose_layers
from hones_lens.model import HookedVLM, model_without_weights, require_choice, takes_iterables
from hones_lens.tasks import Task

if TYPE_CHECKING:
    from hones_lens.app.runs.data_choice import DataChoice

STAGES = ("heads", "held out", "neurons", "masking", "others")
_CELL_BYTES = 60  # of an example under an arm, in the journal and in the result


class PlanKeywords(TypedDict, total=False):
    """What stages are asked for, by keyword; see `plan`."""

    heads: Heads | None
    layers: Layers | None
    top_k: int | None
    controls: int
    positions: str
    prefilter: int | None
    race: float | None
    memory_budget: float | None
    min_pixels: int | None
    max_pixels: int | None


@dataclass(frozen=True)
class _Asked:
    """`PlanKeywords` with their defaults."""

    heads: Heads | None = None
    layers: Layers | None = None
    top_k: int | None = None
    controls: int = 20
    positions: str = "all"
    prefilter: int | None = None
    race: float | None = None
    memory_budget: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True)
class Stage:
    """What a stage costs: arms, examples, FLOP, and numbers (example × arm) that it saves."""

    arms: int
    examples: int
    operations: float
    cells: int


@takes_iterables
def plan(
    model: HookedVLM | str,
    task: str | Task,
    data: DataChoice,
    stages: Sequence[str] = STAGES[:3],
    machines: Machines | None = None,
    **asked: Unpack[PlanKeywords],
) -> list[str]:
    """Lines that give rows, operations, memory, disk and time of each stage, at most.

    Operations are those of `Operations`, with pictures, clean passes and decoding: every answer is taken to
    have all its new tokens, and every intervention to change it at its first, so that its row decodes on.
    An example's length is that of the first of its split. Text has the tokens of the checkpoint's tokenizer
    where it is at hand, else a quarter of its characters.

    Args:
        model: The model, its sizes (`model_without_weights`), or its name, for which no weights are loaded.
        task, data: What will run.
        stages: Of `heads`, `held out`, `neurons`, `masking` and `others`.
        machines: On what; default: one H100.
        asked: `heads`, `layers`, `top_k`, `positions`, `prefilter` and `memory_budget` of `find_heads`;
            `race`: the epsilon of its racing; `controls`: matched random sets of masking (default 20);
            `min_pixels` and `max_pixels` of a picture.

    Raises:
        ValueError: An unknown model, task, stage, head or layer.
    """
    if isinstance(model, str):
        model = model_without_weights(model)
    machines, options = machines or Machines.of_gpus("h100"), _Asked(**asked)
    chosen = as_task(task)
    costs = _Costs(model, chosen, data, options)
    found = {stage: costs.of(stage) for stage in stages}
    lines = [
        f"{model.cfg.model_name}, {chosen.name}: {len(data.discovery(chosen))} discovery and "
        f"{len(data.test(chosen))} held-out examples of ~{costs.row.tokens} tokens, on {machines.name}"
    ]
    for name, stage in found.items():
        rows = stage.arms * stage.examples
        lines.append(
            f"  {name}: {stage.arms:,} arms × {stage.examples:,} examples = {rows:,} rows, "
            f"{stage.operations:.2g} FLOP, about {duration(stage.operations / machines.throughput)}"
        )
    lines.append(f"  memory: {memory_of(model, costs.row.tokens, machines, options.memory_budget)}")
    disk = sum(stage.cells for stage in found.values()) * _CELL_BYTES
    lines.append(f"  disk: about {disk / 1e6:,.1f} MB for the run folder")
    lines.append(f"  {total_of(sum(stage.operations for stage in found.values()), machines)}")
    if options.race is not None:
        lines.append("  a race ends sooner: how soon is not known before")
    return lines


class _Costs:
    """The stages' costs; see `plan`."""

    def __init__(self, model: HookedVLM, task: Task, data: DataChoice, asked: _Asked):
        self.model, self.task, self.options, self.count = model, task, asked, Operations(model)
        discovery, test = data.discovery(task), data.test(task)
        self.n_discovery, self.n_test = len(discovery), len(test)
        self.row = Lengths(model, asked.min_pixels, asked.max_pixels).row(task, discovery[0])
        self.heads = choose_heads(model, asked.heads, asked.layers)
        self.layers = choose_layers(asked.layers, model.cfg.n_layers)
        top_k = default_top_k(model) if asked.top_k is None else asked.top_k
        self.n_critical = min(top_k, len(self.heads))

    def of(self, name: str) -> Stage:
        """One stage's."""
        require_choice("stage", name, STAGES)
        return getattr(self, f"_{name.replace(' ', '_')}")()

    def _heads(self) -> Stage:
        measured, first = self.heads, 0.0
        if self.options.prefilter is not None:  # forward and backward, twice a forward
            measured = measured[:: max(1, len(measured) // self.options.prefilter)]
            measured, first = measured[: self.options.prefilter], 3 * self._forward(self.row.target.tokens)
        forks = self._forks([layer for layer, _ in measured])
        operations = self.n_discovery * (self._clean() + first + forks)
        return Stage(len(measured), self.n_discovery, operations, len(measured) * self.n_discovery)

    def _held_out(self) -> Stage:
        cfg = self.model.cfg
        arms = min(cfg.n_layers * cfg.n_heads, 6 * self.n_critical)  # five random sets, of all layers
        forks = self._forks(range(cfg.n_layers)) * arms / cfg.n_layers
        operations = self.n_test * (self._clean() + forks)
        return Stage(arms + 1, self.n_test, operations, (arms + 1) * self.n_test)

    def _neurons(self) -> Stage:
        arms = 1 + self.n_critical
        each = arms * self.count.forward(self.row.asked, layers=max(self.layers) + 1) + self._picture()
        return Stage(arms, self.n_discovery, self.n_discovery * each, 0)

    def _masking(self) -> Stage:
        return self._masked(len(RATIOS) * (self.options.controls + 1))

    def _others(self) -> Stage:
        stage = self._masked(len(pipeline.OTHER_RANKINGS) * (pipeline.OTHERS_CONTROLS + 1))
        passes = 6 * self._forward(self.row.target.tokens)  # three rankings by one, one with gradients
        return Stage(stage.arms, stage.examples, stage.operations + self.n_discovery * passes, stage.cells)

    def _masked(self, arms: int) -> Stage:
        """Neurons scaled from the lowest layer on: answers, then log-probabilities of the right ones."""
        lowest = min(self.layers)
        answered = self.count.fork(lowest, self.row.answered, heads=False) + self._decoding()
        rated = self.count.fork(lowest, [self.row.target], heads=False)
        clean = self._clean() + self.count.clean([self.row.target]) + self._picture()
        operations = self.n_test * (clean + arms * (answered + rated))
        return Stage(arms + 1, self.n_test, operations, 2 * (arms + 1) * self.n_test)

    def _clean(self) -> float:
        """An example's picture, its clean answer, and the walk that forks start from."""
        answer = 0.0
        if not self.task.ranks:
            asked = self.row.asked
            answer = self.count.forward(asked) + self.count.decode(asked, MAX_NEW_TOKENS - 1)
        return self._picture() + answer + self.count.clean(self.row.answered)

    def _forks(self, layers: Sequence[int]) -> float:
        """One example's forks, of a head in each of these layers (one of them as often as it has heads)."""
        segments = self.row.answered
        if self.options.positions == "last":
            segments = tuple(segment.late() for segment in segments if segment.keep)
        forks = sum(self.count.fork(layer, segments) for layer in layers)
        tables = len(set(layers)) * self.count.head_tables()
        return forks + tables + len(layers) * self._decoding()

    def _decoding(self) -> float:
        return 0.0 if self.task.ranks else self.count.decode(self.row.asked, MAX_NEW_TOKENS - 1)

    def _forward(self, tokens: int) -> float:
        return self.count.forward(tokens) + self._picture()

    def _picture(self) -> float:
        return self.row.n_grids * self.count.picture(*self.row.grid)
