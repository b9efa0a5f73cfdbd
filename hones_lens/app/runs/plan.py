"""Estimate of the cost of a run before it starts, without its model's weights (`--plan`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from hones_lens.app.runs import stages as pipeline
from hones_lens.app.runs.operations import Operations, Segment
from hones_lens.data import Example
from hones_lens.engine import MAX_NEW_TOKENS, Budget
from hones_lens.hones import RATIOS, default_top_k
from hones_lens.interventions import choose_heads, choose_layers
from hones_lens.model import HookedVLM, checkpoint_path, find_settings, takes_iterables
from hones_lens.tasks import Task, load_task

if TYPE_CHECKING:
    from hones_lens.app.runs.data_choice import DataChoice

# TFLOP/s in dense bfloat16 and GB of memory, as their makers publish them.
GPUS = {
    "a100": (312, 80),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "l40s": (362, 48),
    "l4": (121, 24),
    "rtx4090": (165, 24),
}
MFU = 0.4  # assumed share of these that is reached
_MEMORY_SHARE = 0.4  # of what the weights leave free, as of `Budget`
_CHAT_TOKENS = 16  # of a chat template, and of the system prompt that some have
_CELL_BYTES = 60  # of an example under an arm, in the journal and in the result
_QUARTER = 4  # characters of English a token, where there is no tokenizer
_BOUNDS = {"min_pixels": 3136, "max_pixels": 12845056}  # of a picture, where a family resizes it


@dataclass(frozen=True)
class Machines:
    """What the run is planned for.

    Attributes:
        name: How to name it.
        throughput: FLOP/s that one of them reaches.
        count: How many work at once.
        memory: GB of one; None where it is not known.
    """

    name: str
    throughput: float
    count: int = 1
    memory: float | None = None

    @classmethod
    def of_gpus(cls, name: str, count: int = 1, mfu: float = MFU) -> Machines:
        """GPUs of the table, at a share of what their maker publishes."""
        peak, memory = GPUS[name]
        said = f"{name}, {mfu:.0%} of its {peak} dense bf16 TFLOP/s assumed"
        return cls(said, mfu * peak * 1e12, count, memory)

    @classmethod
    @torch.no_grad()
    def this_one(cls, model: HookedVLM, tokens: int = 64) -> Machines:
        """This machine, timed over a batch through the decoder, after one warm-up pass."""
        rows, seconds = Budget(model).rows(tokens), 0.0
        ids = torch.full((rows, tokens), model.cfg.eos_token_ids[0], device=model.cfg.device)
        for _ in range(2):
            started = time.perf_counter()
            model(ids, stop_at_layer=model.cfg.n_layers).sum().item()
            seconds = time.perf_counter() - started
        operations = rows * model.cfg.n_layers * Operations(model).block(tokens)
        return cls("this machine, as measured now", operations / seconds)


@dataclass(frozen=True)
class Row:
    """Sizes of an example: its picture in patches, its prompts as the engine runs them.

    Attributes:
        grid: Rows and columns of patches.
        answered: Prompt and answer, or prefix and candidates.
        asked: The prompt that the target follows.
        target: Prompt and right answer.
    """

    grid: tuple[int, int]
    answered: tuple[Segment, ...]
    asked: int
    target: Segment

    @property
    def tokens(self) -> int:
        """Tokens that an arm runs."""
        return sum(segment.rows * segment.tokens for segment in self.answered)


@dataclass(frozen=True)
class Stage:
    """What a stage costs: arms, examples, FLOP, and numbers (example × arm) that it saves."""

    arms: int
    examples: int
    operations: float
    cells: int


@takes_iterables
def plan(
    model: HookedVLM,
    task: str,
    data: DataChoice,
    stages: Sequence[str],
    machines: Machines,
    options: Any,
) -> list[str]:
    """Lines that give rows, operations, memory, disk and time of each stage, at most.

    Operations are those of `Operations`, with pictures, clean passes and decoding: every answer is taken to
    have all its new tokens, and every intervention to change it at its first, so that its row decodes on.
    An example's length is that of the first of its split. Text has the tokens of the checkpoint's tokenizer
    where it is at hand, else a quarter of its characters.

    Args:
        model: The model, or its sizes.
        task, data, stages: What will run.
        machines: On what.
        options: `heads`, `layers`, `top_k`, `controls`, `positions`, `prefilter`, `race`,
            `memory_budget`, `min_pixels` and `max_pixels`, as the command line has them.
    """
    costs = _Costs(model, load_task(task), data, options)
    cfg, found = model.cfg, {stage: costs.of(stage) for stage in stages}
    chosen = load_task(task)
    lines = [
        f"{cfg.model_name}, {task}: {len(data.discovery(chosen))} discovery and {len(data.test(chosen))} "
        f"held-out examples of ~{costs.row.tokens} tokens, on {machines.name}"
    ]
    for name, stage in found.items():
        rows = stage.arms * stage.examples
        lines.append(
            f"  {name}: {stage.arms:,} arms × {stage.examples:,} examples = {rows:,} rows, "
            f"{stage.operations:.2g} FLOP, about {_duration(stage.operations / machines.throughput)}"
        )
    lines.append(f"  memory: {costs.memory(machines, options.memory_budget)}")
    disk = sum(stage.cells for stage in found.values()) * _CELL_BYTES
    lines.append(f"  disk: about {disk / 1e6:,.1f} MB for the run folder")
    total = sum(stage.operations for stage in found.values()) / machines.throughput
    lines.append(f"  in all at most {_duration(total)} on one")
    if machines.count > 1:
        lines[-1] += f", {_duration(total / machines.count)} on {machines.count} that share the examples"
    if options.race is not None:
        lines.append("  a race ends sooner: how soon is not known before")
    return lines


class _Costs:
    """The stages' costs; see `plan`."""

    def __init__(self, model: HookedVLM, task: Task, data: DataChoice, options: Any):
        self.model, self.task, self.options, self.count = model, task, options, Operations(model)
        discovery, test = data.discovery(task), data.test(task)
        self.n_discovery, self.n_test = len(discovery), len(test)
        tokens_of, bounds = _tokenizer(model), {}
        for name in ("min_pixels", "max_pixels"):
            if getattr(options, name, None) is not None:
                bounds[name] = getattr(options, name)
        self.row = _row(model, task, discovery[0], tokens_of, bounds)
        self.heads = choose_heads(model, options.heads, options.layers)
        self.layers = choose_layers(options.layers, model.cfg.n_layers)
        top_k = default_top_k(model) if options.top_k is None else options.top_k
        self.n_critical = min(top_k, len(self.heads))

    def of(self, name: str) -> Stage:
        """One stage's."""
        return {
            "heads": self._heads,
            "held out": self._held_out,
            "neurons": self._neurons,
            "masking": self._masking,
            "others": self._others,
        }[name]()

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
        return self.count.picture(*self.row.grid)

    def memory(self, machines: Machines, budget: float | None) -> str:
        """Of weights, and of rows at a time."""
        cfg, free = Budget(self.model, 1.0), None
        weights = sum(p.numel() for p in self.model.parameters()) * self.model.cfg.dtype.itemsize
        said = f"{weights / 1e9:.2f} GB of weights"
        if machines.memory is not None:
            free = machines.memory - weights / 1e9
            if free <= 0:
                return f"{said} do not fit into {machines.memory} GB: choose another --gpu"
        gigabytes = budget or (None if free is None else _MEMORY_SHARE * free)
        per_row = self.row.tokens * cfg.bytes_per_token / 1e9
        if gigabytes is None:
            return f"{said}, {per_row:.2f} GB for each row at a time"
        rows = max(1, int(gigabytes // per_row))
        return f"{said}, {rows * per_row:.2f} GB for {rows} rows at a time"


def _tokenizer(model: HookedVLM) -> Callable[[str], int]:
    """How many tokens a text has: of the folder's tokenizer, or a guess."""
    settings, folder = find_settings(model.cfg.model_name), Path(model.cfg.model_name)
    if settings is not None and settings.checkpoint is not None:
        folder = checkpoint_path(settings.checkpoint)
    if settings is not None and settings.checkpoint is None:
        return lambda text: -(-len(text) // _QUARTER)
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)


def _row(
    model: HookedVLM,
    task: Task,
    example: Example,
    tokens_of: Callable[[str], int],
    bounds: dict[str, int],
) -> Row:
    vision = model.cfg.vision
    grid = _grid(model, example.image.size, bounds)
    image = grid[0] * grid[1] // vision.merge_size**2 + int(vision.keep_class_token)
    asked = image + _CHAT_TOKENS + tokens_of(task.target_prompt(example))
    right = max(1, tokens_of(task.answer(example)))
    target = Segment(1, asked + right - 1, 0, right)
    if not task.ranks:
        answered = (Segment(1, asked + MAX_NEW_TOKENS - 1, 0, MAX_NEW_TOKENS),)
        return Row(grid, answered, asked, target)
    prompts = [tokens_of(prompt) for prompt in task.prompts(example)]
    behind = _CHAT_TOKENS // 2 + sum(prompts) // len(prompts)
    shared = image + _CHAT_TOKENS // 2
    return Row(grid, (Segment(1, shared, 0, 0), Segment(len(prompts), behind, shared, 1)), asked, target)


def _grid(model: HookedVLM, size: tuple[int, int], bounds: dict[str, int]) -> tuple[int, int]:
    """Rows and columns of patches of a picture (width, height)."""
    vision, settings = model.cfg.vision, find_settings(model.cfg.model_name)
    if vision.image_size is not None:
        return vision.patches_per_side, vision.patches_per_side
    known = settings.images if settings is not None and settings.images else {}
    limits = {**_BOUNDS, **known, **bounds}
    height, width = smart_resize(size[1], size[0], vision.patch_size * vision.merge_size, **limits)
    return height // vision.patch_size, width // vision.patch_size


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
