"""One small result of every kind, as it was when the files in `results/old_files` were written."""

from __future__ import annotations

import torch

from hones_lens.analysis.lens.difference import LensDifference, LensToken
from hones_lens.analysis.lens.table import LensPosition, LogitLens
from hones_lens.engine.evaluation import Evaluation, KindMetric
from hones_lens.hones.attribution.flow import HeadNeuronFlow, PromotedToken
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.held_out import HeldOutHead, HeldOutHeads
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking_result import Control, KindDrop, MaskingResult
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.groups import Overlap, SharedNeurons
from hones_lens.hones.steering.scales import NeuronScales
from hones_lens.hones.steering.side_effects import SideEffect, SideEffects
from hones_lens.hones.steering.table import SteeringRow, SteeringTable
from hones_lens.results.files import Component
from hones_lens.results.labelled import Labelled
from hones_lens.results.racing import RaceResult, Racing
from hones_lens.results.statistics import Interval

NAN = float("nan")


def interval(value: float) -> Interval:
    return Interval(value, value - 0.25, value + 0.5, 0.95, 2)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def masking() -> MaskingResult:
    kinds = {
        "color": KindDrop(1, 1.0, 0.5, -0.1, -0.7),
        "text": KindDrop(2, 0.5, 0.25, -1.0, -2.0, interval(0.25), interval(0.5), interval(0.25), 0.125),
    }
    return MaskingResult(
        task="vqa",
        metric_name="accuracy",
        method="hones",
        model_name="tiny-llava",
        n_neurons=3,
        ratio=0.01,
        baseline=0.75,
        masked=0.5,
        baseline_log_prob=-0.5,
        masked_log_prob=-1.5,
        drops=(0.5, 0.0),
        log_prob_drops=(1.5, 0.5),
        metric_interval=interval(0.25),
        log_prob_interval=interval(1.0),
        relative_interval=interval(33.25),
        baseline_interval=interval(0.75),
        masked_interval=interval(0.5),
        baseline_log_prob_interval=interval(-0.5),
        masked_log_prob_interval=interval(-1.5),
        controls=(Control(0.7, -0.6, {"color": 1.0}, {"color": -0.2}), Control(0.75, -0.5)),
        kinds=kinds,
        example_ids=("a", "b"),
        metric_p=0.25,
    )


def steering() -> SteeringTable:
    scales = NeuronScales(((0, 3), (1, 2)), (0.5, -0.25), "vqa", "HONES", "tiny-llava", {"lr": 5e-4}, 8)
    values = {"scores": (1.0, 0.0), "log_probs": (-0.1, -2.5), "statistics": ((1.0, 1.0), (0.0, 1.0))}
    rows = (
        SteeringRow("Base", 0, {}, 0.0, 0.5, interval(0.0), 1.0, -1.3, interval(0.0), **values, scales=None),
        SteeringRow(
            "HONES",
            1,
            {"lr": 0.005, "epochs": 2},
            0.5,
            0.75,
            interval(0.25),
            0.5,
            -1.0,
            interval(0.3),
            **values,
            scales=scales,
        ),
    )
    return SteeringTable("vqa", "accuracy", "tiny-llava", "hones", 2, 8, 4, ("a", "b"), 0, 3, rows)


RESULTS = {
    "heads": HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="replace_with_other_heads_mean",
        model_name="tiny-llava",
        scores=tensor([[0.5, 0.0], [NAN, -0.25]]),
        drops=tensor([[[1.0, 0.0], [0.0, 0.0]], [[NAN, NAN], [-0.25, NAN]]]),
        baseline=0.75,
        base_scores=tensor([1.0, 0.5]),
        example_ids=("a", "b"),
        kinds=("color", "text"),
        top_k=1,
        traded="heads raced",
        race=RaceResult((0,), (2, 2, 0, 1), (0.1, -1.0, -1.0, -0.5), (0.9, 0.0, 1.0, 0.0), Racing()),
        near_ties=2,
        positions="last",
        baseline_interval=interval(0.75),
        score_ends=tensor([[[0.25, 0.75], [0.0, 0.0]], [[NAN, NAN], [NAN, NAN]]]),
    ),
    "neurons": NeuronScores(
        "vqa",
        "hones",
        "tiny-llava",
        tensor([[0.5, -torch.inf, 0.125], [1.5, 0.0, -0.25]]),
        0.5,
        60,
        tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
    ),
    "groups": GroupMasking((masking(),)),
    "held-out": HeldOutHeads(
        task="vqa",
        metric_name="accuracy",
        model_name="tiny-llava",
        n_selected_on=2,
        baseline=interval(0.5),
        heads=(
            HeldOutHead(1, 3, 0.5, interval(0.5), True, interval(0.25), 0.01, True),
            HeldOutHead(0, 2, 0.25, None, None, interval(0.0), 1.0, False),
        ),
        mean_drop=interval(0.125),
        random=(0.0, 0.125),
        q=0.05,
        example_ids=("c", "d"),
    ),
    "flow": HeadNeuronFlow(
        task="vqa",
        model_name="tiny-llava",
        heads=(Component(0, 1, 0.5), Component(1, 0, 0.25)),
        neurons=(Component(1, 7, 0.75),),
        contributions=tensor([[0.5], [0.25]]),
        total=1.5,
        activations=tensor([-0.5]),
        promoted=((PromotedToken("▁red", 1.5), PromotedToken("<s>", 0.5)),),
        n_examples=60,
    ),
    "overlap": Overlap(
        selected={"vqa": ((0, 1), (1, 2)), "ocr": ((1, 2),)},
        n_layers=2,
        d_mlp=4,
        shared=(SharedNeurons(("vqa", "ocr"), 1, 0.5, 0.25, 0.5, 1.0),),
        draws=100,
    ),
    "lens-delta": LensDifference(
        "tiny-llava",
        2,
        ((), (LensToken(5, "red", 0.5, 0.25, 0.75),)),
        ((), (LensToken(6, "blue", -0.5),)),
        task="vqa",
        n_neurons=3,
    ),
    "logit-lens": LogitLens(
        model_name="tiny-llava",
        places=(LensPosition(0, 11, ":"),),
        layers=("embed", 0),
        ids=torch.tensor([[[3, 1], [2, 0]]]),
        tokens=((("a", "b"), ("c", "d")),),
        logits=torch.tensor([[[1.5, 0.1], [2.5, -0.3]]]),
        probabilities=torch.tensor([[[0.75, 0.2], [0.9, 0.05]]]),
    ),
    "steering": steering(),
    "scales": NeuronScales(((0, 3),), (0.5,), history=({"loss": 1.5, "max_abs": 0.5},)),
    "side-effects": SideEffects(
        "tiny-llava",
        (
            SideEffect(
                "vqa",
                "ocr",
                "ANLS",
                interval(0.5),
                interval(0.25),
                interval(-0.25),
                interval(0.5),
                0.25,
                0.75,
            ),
        ),
    ),
    "labelled": Labelled(
        what="logit difference restored",
        values=tensor([[0.5, NAN], [0.25, 1.0]]),
        axes=("layer", "group"),
        labels={"group": ("image", "last")},
        n=4,
        low=tensor([[0.25, NAN], [0.0, 0.5]]),
        high=tensor([[0.75, NAN], [0.5, 1.5]]),
        notes=("baseline 1.5",),
    ),
    "labelled-one": Labelled("share", tensor(0.5), (), p=tensor(0.25)),
    "evaluation": Evaluation(
        task="vqa",
        metric_name="accuracy",
        model_name="tiny-llava",
        interval=interval(0.5),
        scores=(1.0, 0.0, 0.5),
        kinds={"color": KindMetric(1.0, 1, None), "text": KindMetric(0.25, 2, interval(0.25))},
        example_ids=("a", "b", "c"),
    ),
}
