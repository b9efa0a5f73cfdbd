"""Results made up by hand for the tests of figures, report and terminal: no model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from hones_lens.app.report.run_view import ExampleView, NeuronTokens, RunView
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking_result import Control, KindDrop, MaskingResult
from hones_lens.results.racing import RaceResult, Racing
from hones_lens.results.statistics import Interval

KINDS = ("color", "shape", "name")
RATIOS = (0.005, 0.01, 0.02, 0.05, 0.1)


def heads(
    shape: tuple[int, int] = (4, 8), n: int = 60, top_k: int = 3, metric_name: str = "accuracy"
) -> HeadScores:
    """Drops of 0 or 1: two heads that matter, one that hurts, and noise."""
    rng = np.random.default_rng(0)
    share = rng.uniform(0, 0.04, shape)
    share[1, 3], share[-1, 2], share[0, 1] = 0.45, 0.3, 0.02
    drops = (rng.random((*shape, n)) < share[..., None]).astype(float)
    drops[0, 0] = -(rng.random(n) < 0.15).astype(float)
    scores = torch.tensor(drops.mean(-1))
    return HeadScores(
        task="vqa",
        metric_name=metric_name,
        intervention="replace_with_other_heads_mean",
        model_name="tiny-llava",
        scores=scores,
        drops=torch.tensor(drops),
        baseline=0.93,
        base_scores=torch.ones(n, dtype=torch.float64),
        example_ids=tuple(f"e{i}" for i in range(n)),
        kinds=tuple(KINDS[i % 3] for i in range(n)),
        top_k=top_k,
        baseline_interval=Interval(0.93, 0.9, 0.96, 0.95, n),
        score_ends=torch.stack([scores - 0.06, scores + 0.08], -1),
    )


def neurons(
    shape: tuple[int, int] = (4, 384), task: str = "vqa", method: str = "hones", seed: int = 0
) -> NeuronScores:
    """Positive scores that grow with the layer."""
    scores = np.random.default_rng(seed).exponential(size=shape) * np.linspace(0.5, 1.0, shape[0])[:, None]
    return NeuronScores(task, method, "tiny-llava", torch.tensor(scores), 0.01, 60)


def masking(
    masked: float = 0.71,
    masked_log_prob: float = -1.05,
    *,
    baseline: float = 0.93,
    controls: Sequence[tuple[float, float]] | None = None,
    half: tuple[float, float] = (0.05, 0.12),
    n_neurons: int = 15,
    task: str = "vqa",
    metric_name: str = "accuracy",
    method: str = "hones",
    n: int = 200,
) -> MaskingResult:
    """One result on a model of 1,536 neurons; `half` are half the widths of the intervals.

    `controls` are (metric, log-probability) of the random sets; default: 20 close to the baseline.
    """
    base_log_prob = -0.21
    if controls is None:
        rng = np.random.default_rng(n_neurons)
        small = n_neurons / 1500
        controls = [
            (baseline - small * rng.uniform(-0.1, 0.9), base_log_prob - small * rng.uniform(0, 3))
            for _ in range(20)
        ]
    drop, lost = baseline - masked, base_log_prob - masked_log_prob

    def around(value: float, width: float) -> Interval:
        return Interval(value, value - width, value + width, 0.95, n)

    shares = (0.4, 0.1, 1.6)
    kinds = {
        kind: KindDrop(n // 3, baseline, baseline - part * drop, base_log_prob, base_log_prob - part * lost)
        for kind, part in zip(KINDS, shares, strict=True)
    }
    random = [Control(m, p, {kind: m + 0.01 * i - 0.02 for i, kind in enumerate(KINDS)}) for m, p in controls]
    return MaskingResult(
        task=task,
        metric_name=metric_name,
        method=method,
        model_name="tiny-llava",
        n_neurons=n_neurons,
        ratio=n_neurons / 1536,
        baseline=baseline,
        masked=masked,
        baseline_log_prob=base_log_prob,
        masked_log_prob=masked_log_prob,
        drops=(drop,) * n,
        log_prob_drops=(lost,) * n,
        metric_interval=around(drop, half[0]),
        log_prob_interval=around(lost, half[1]),
        relative_interval=around(100 * drop / baseline, 100 * half[0] / baseline),
        baseline_interval=around(baseline, 0.03),
        masked_interval=around(masked, 0.04),
        baseline_log_prob_interval=around(base_log_prob, 0.06),
        masked_log_prob_interval=around(masked_log_prob, 0.08),
        controls=tuple(random),
        kinds=kinds,
        example_ids=tuple(f"t{i}" for i in range(n)),
        metric_p=0.0125,
        log_prob_p=None if n_neurons == 7 else 0.3,
    )


def curve() -> list[MaskingResult]:
    """From next to nothing at 0.46 % to much at 10 %."""
    points = [(7, 0.925, -0.26), (15, 0.90, -0.52), (30, 0.84, -0.90), (76, 0.66, -1.7), (153, 0.41, -2.9)]
    return [masking(metric, log_prob, n_neurons=count) for count, metric, log_prob in points]


def image(size: tuple[int, int] = (112, 112)) -> Image.Image:
    """A red circle and a blue box on grey."""
    picture = Image.new("RGB", size, (114, 114, 114))
    draw = ImageDraw.Draw(picture)
    width, height = size
    draw.ellipse((width * 0.1, height * 0.1, width * 0.4, height * 0.4), fill=(220, 40, 40))
    draw.rectangle(
        (width * 0.5, height * 0.6, width * 0.95, height * 0.85), fill="white", outline="blue", width=2
    )
    return picture


def attention(rows: int = 8, columns: int = 8) -> torch.Tensor:
    """Most of it on the second patch of the second row; sums to 0.8."""
    values = torch.full((rows, columns), 0.1 / (rows * columns - 1))
    values[1, 1] = 0.7
    return values


def example(**changes: object) -> ExampleView:
    values = {
        "image": image(),
        "prompt": "Question: what is the red circle called?\nAnswer the question with a short phrase.",
        "target": "dax",
        "answer": "dax",
        "answer_masked": "wug",
        "head": "L1H3",
        "looks": {"L1H3": attention()},
    }
    return ExampleView(**{**values, **changes})


def run(**changes: object) -> RunView:
    values = {
        "title": "Heads and neurons of VQA in tiny-llava",
        "model_name": "tiny-llava",
        "task": "vqa",
        "metric_name": "accuracy",
        "settings": {"seed": 3407, "dataset": "shapes", "limits": {"discovery": 60, "test": 200}},
        "environment": {"python": "3.11", "torch": "2.13.0"},
        "heads": heads(),
        "neurons": neurons(),
        "masking": curve(),
        "others": {"direct": masking(0.88, -0.4, method="direct"), "mean_activation": masking(0.91, -0.3)},
        "examples": [example(), example(prompt="<image>\nWhich <s> & word?", answer="<pad>", target="ACE")],
        "promoted": {
            (c.layer, c.index): NeuronTokens(("dax", "</s>", "<unk>"), 0.5) for c in neurons().top(4)
        },
        "evaluation": {"accuracy": Interval(0.93, 0.89, 0.965, 0.95, 200), "examples": 200},
    }
    return RunView(**{**values, **changes})


def raced_heads() -> HeadScores:
    """Of `heads`: layer 2 was not measured, layer 3 on the first 20 of 60 examples."""
    found = heads()
    found.drops[2] = torch.nan
    found.drops[3, :, 20:] = torch.nan
    found.scores[:] = found.drops.nanmean(-1)
    race = RaceResult((0, 11, 26), (60,) * 32, (-1.0,) * 32, (1.0,) * 32, Racing())
    return replace(found, traded="heads raced (right up to 0.01)", race=race)
