"""Steering, overlap and group masking made up by hand, for the tests of figures and report: no model runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from helpers.example_results import masking
from hones_lens.analysis.lens.difference import LensDifference, LensToken
from hones_lens.analysis.patching.agreement import Agreement
from hones_lens.engine.evaluation import Evaluation, KindMetric
from hones_lens.hones.attribution.compare import RankingComparison
from hones_lens.hones.attribution.held_out import HeldOutHead, HeldOutHeads
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.groups import Overlap, find_overlap
from hones_lens.hones.steering.comparison import METHODS
from hones_lens.hones.steering.scales import NeuronScales
from hones_lens.hones.steering.side_effects import SideEffect, SideEffects
from hones_lens.hones.steering.table import SteeringRow, SteeringTable
from hones_lens.results.statistics import Interval

TASKS = ("vqa", "ocr", "caption", "retrieval")
METRICS = {"vqa": "accuracy", "ocr": "ANLS", "caption": "BLEU-4", "retrieval": "NDCG@5"}
GAINS = {"Fixed-Amp": -0.08, "Grid-Search": 0.012, "HONES without KL": 0.035, "HONES": 0.041}
DRAWS = (-0.01, 0.004, 0.0, 0.012, -0.006)


def interval(value: float, half: float, n: int = 84) -> Interval:
    return Interval(value, value - half, value + half, 0.95, n)


def _steering_row(method: str, draw: int, gain: float, n: int) -> SteeringRow:
    scales = NeuronScales(((1, 2), (3, 4)), (0.2, -0.4), "vqa", method, "tiny-llava")
    return SteeringRow(
        method=method,
        draw=draw,
        chosen={} if method == "Base" else {"lr": 0.05, "epochs": 4},
        max_abs=0.0 if method == "Base" else 0.4,
        metric=0.7 + gain,
        gain=interval(gain, 0.0 if method == "Base" else 0.03, n),
        p=1.0 if method == "Base" else 0.2,
        log_prob=-0.9 + 5 * gain,
        log_prob_gain=interval(5 * gain, 0.0 if method == "Base" else 0.11, n),
        scores=(1.0,) * n,
        log_probs=(-0.9,) * n,
        statistics=tuple((float(i % 10 < 7), 1.0) for i in range(n)),
        scales=None if method == "Base" else scales,
    )


def steering(task: str = "vqa", n: int = 84, methods: Sequence[str] = METHODS) -> SteeringTable:
    """A table with five random draws; HONES gains 0.041."""
    rows = []
    for method in methods:
        gains = DRAWS if method == "RandNeuron" else (GAINS.get(method, 0.0),)
        rows += [_steering_row(method, draw, gain, n) for draw, gain in enumerate(gains)]
    return SteeringTable(
        task=task,
        metric_name=METRICS[task],
        model_name="tiny-llava",
        neuron_method="hones",
        n_neurons=77,
        n_learned=147,
        n_chosen=63,
        example_ids=tuple(f"t{i}" for i in range(n)),
        seed=0,
        negatives=7,
        rows=tuple(rows),
    )


def effects() -> SideEffects:
    """Scales help their own task, and do a little to the others; retrieval has fewer examples."""
    rng = np.random.default_rng(1)
    cells = []
    for owner in TASKS:
        for task in TASKS:
            gain = 0.04 if owner == task else float(rng.normal(0, 0.012))
            n = 12 if task == "retrieval" else 84
            about = (owner, task, METRICS[task], interval(0.7, 0.05, n), interval(0.7 + gain, 0.05, n))
            cells.append(SideEffect(*about, interval(gain, 0.02, n), interval(gain, 0.1, n), 0.03, 0.4))
    return SideEffects("tiny-llava", tuple(cells))


def shared(tasks: Sequence[str] = TASKS, n_layers: int = 4, d_mlp: int = 40) -> Overlap:
    """Selections of 16 neurons each that meet more often than chance in the last layer."""
    rng = np.random.default_rng(0)
    core = [(n_layers - 1, i) for i in range(4)]
    chosen = {}
    for task in tasks:
        rest = {(int(rng.integers(n_layers)), int(rng.integers(4, d_mlp))) for _ in range(40)}
        chosen[task] = core + sorted(rest)[:12]
    return find_overlap(chosen, shape=(n_layers, d_mlp), draws=500)


def groups(tasks: Sequence[str] = TASKS) -> GroupMasking:
    """Each task loses most with its own neurons and the general ones; 3 neurons of each group."""
    results = []
    for task in tasks:
        for i, name in enumerate([*(f"{t} only" for t in tasks), "pair", "triple", "general"]):
            own = 0.2 if name in (f"{task} only", "general") else 0.01 * i - 0.02
            controls = [(0.93 - 0.01 * d, -0.21 - 0.02 * d) for d in range(5)]
            about = {"task": task, "metric_name": METRICS[task], "method": name, "controls": controls}
            results.append(masking(0.93 - own, -0.21 - 3 * own, n_neurons=3, n=84, **about))
    return GroupMasking(tuple(results))


def lens() -> LensDifference:
    """Nothing below layer 1; a token that HTML would take for a tag."""
    red = LensToken(5, "▁red", 0.31, 0.2, 0.44)
    falls = ((), (red,), (LensToken(6, "<b>", 1.2), LensToken(7, "▁dax", 0.9)))
    rises = ((), (), (LensToken(8, "</s>", -0.4),))
    return LensDifference("tiny-llava", 84, falls, rises, task="vqa", n_neurons=77)


def held_out() -> HeldOutHeads:
    heads = (
        HeldOutHead(1, 3, 0.45, interval(0.45, 0.1), True, interval(0.4, 0.1), 0.0005, True),
        HeldOutHead(3, 2, 0.3, None, None, interval(0.02, 0.05), 0.4, False),
    )
    ids = tuple(f"t{i}" for i in range(84))
    base = interval(0.93, 0.04)
    about = ("vqa", "accuracy", "tiny-llava", 60, base, heads, interval(0.21, 0.07))
    return HeldOutHeads(*about, (0.01, 0.05), 0.05, ids)


def evaluation(task: str = "vqa") -> Evaluation:
    """Two kinds; of the second there is one example, and so no interval."""
    kinds = {"colour": KindMetric(0.8, 20, interval(0.8, 0.15, 20)), "<count>": KindMetric(1.0, 1, None)}
    scores, ids = (1.0,) * 21, tuple(f"t{i}" for i in range(21))
    return Evaluation(task, "accuracy", "tiny-llava", interval(0.81, 0.14, 21), scores, kinds, ids)


def agreement(n_pairs: int = 4) -> Agreement:
    """Three components; each pair's changes differ."""
    offsets = torch.linspace(-0.1, 0.1, n_pairs, dtype=torch.float64)[:, None]
    estimated = torch.tensor([[0.4, -0.2, 0.1]], dtype=torch.float64) + offsets
    measured = torch.tensor([[0.5, -0.1, 0.3]], dtype=torch.float64) - offsets
    return Agreement("z by <AtP*>", ((0, 1), (2, 0), (3, 3)), estimated, measured)


def rankings() -> RankingComparison:
    """Two layers of three heads; one was not measured in the second ranking."""
    scores = torch.tensor([[[0.1, 0.5, -0.2], [0.3, 0.0, 0.2]], [[0.2, 0.6, 0.1], [torch.nan, -0.1, 0.3]]])
    return RankingComparison(
        ("<mean>", "patch"), scores, 0.7, -0.1, 0.95, n=5, k=2, shared=((0, 1),), expected=0.8, p=0.6
    )


def scales() -> NeuronScales:
    neurons = ((0, 7), (2, 3), (2, 9))
    return NeuronScales(neurons, (0.5, -0.25, 0.0), "vqa", "<HONES>", "tiny-llava", n_examples=44)
