"""The data of a run that its report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from hones_lens.analysis import LensDifference, LogitLens
from hones_lens.app.report.verdict import headline
from hones_lens.hones import (
    GroupMasking,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    NeuronScores,
    Overlap,
    SideEffects,
    SteeringTable,
)
from hones_lens.model import Region, VLMInputs
from hones_lens.results import Interval, Labelled


@dataclass(frozen=True, eq=False)
class ExampleView:
    """One example of a report.

    Attributes:
        image: The picture.
        prompt, target: The prompt, and the right answer.
        answer, answer_masked: The model's answer, unedited and with neurons masked; None: not generated.
        head: The head whose attention is shown first, e.g. `L3H5`.
        masked_label: What was masked, e.g. `76 neurons masked`.
        attention_from: The query token of the attention.
        region: The part of the picture that the grids cover; None: the whole picture.
        looks: For each head to choose from: its attention from one token to the image, [rows columns].
        lens: Logit lens at the last prompt token.
        image_lens: Logit lens of the image tokens for the right answer, by layer, row and column.
    """

    image: Image.Image
    prompt: str
    target: str
    answer: str
    answer_masked: str | None = None
    head: str = ""
    masked_label: str = "task neurons masked"
    attention_from: str = "the last prompt token"
    region: Region | None = None
    looks: Mapping[str, Tensor] = field(default_factory=dict)
    lens: LogitLens | None = None
    image_lens: Labelled | None = None


@dataclass(frozen=True, eq=False)
class PairView:
    """The first pair of an activation patching.

    Attributes:
        id, prompt, answer: The pair's id, its prompt, and the right token on the clean input.
        clean: The clean picture.
        foil: The right token on the corrupted input; None if there is no other answer.
        corrupted: The corrupted picture; None if the corruption does not make one.
        clean_answer, corrupted_answer: What the model generates for either; empty if it was not stored.
        inputs: The clean inputs, which locate the picture's patches among the positions.
    """

    id: str
    prompt: str
    answer: str
    clean: Image.Image
    foil: str | None
    corrupted: Image.Image | None
    inputs: VLMInputs
    clean_answer: str = ""
    corrupted_answer: str = ""


@dataclass(frozen=True, eq=False)
class PatchView:
    """One activation patching.

    Attributes:
        result: Its values.
        options: The options of `patch_activations`: `what`, `by`, `direction`, `metric`, `raw`.
        pairs: What was patched, in words, e.g. `64 counterfactual pairs of vqa`.
        pair: The first of them; None if it was not stored.
        answers: How many pairs the model gets right unpatched, in words.
        problem: Why nothing can be concluded; empty if something can, or if it was not stored.
    """

    result: Labelled
    options: Mapping[str, Any]
    pairs: str
    pair: PairView | None = None
    answers: str = ""
    problem: str = ""


class NeuronTokens(NamedTuple):
    """The tokens that a neuron promotes most, at its mean activation at the last prompt position.

    If the mean activation is not known, they are the tokens that its output row raises.
    """

    tokens: tuple[str, ...]
    activation: float | None = None


@dataclass(frozen=True, eq=False)
class RunView:
    """The results of one run that its report shows; sections without results are left out.

    Attributes:
        title: Heading.
        model_name, task, metric_name: The model, the task and its metric.
        settings, environment: Names and values; mappings may be nested.
        heads: Head scores (HONES eq. H1).
        neurons: Neuron scores (HONES eqs. H2 and H3).
        masking: Masking results (HONES eq. H4), at one or several shares of neurons.
        others: By ranking: masking results at the same budget.
        examples: Examples with the attention of heads.
        promoted: By (layer, index): the tokens that a neuron promotes most.
        evaluation: Metrics of the unedited model, e.g. {"accuracy": Interval, "examples": 200}.
        held_out: The critical heads measured again on examples that did not select them.
        steering: Steering results (HONES eq. H5) by label, e.g. `learned and measured on shapes`.
        overlap, groups: Neurons that tasks share (HONES eq. H6), and the results of masking each group.
        effects: By data set: every task under the scales of every task.
        lenses: By task: the change of the logit lens when its neurons are masked.
        flow: Contributions of the critical heads to the neurons, and the tokens that these promote.
        patching: An activation patching.
    """

    title: str
    model_name: str
    task: str
    metric_name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    heads: HeadScores | None = None
    neurons: NeuronScores | None = None
    masking: Sequence[MaskingResult] = ()
    others: Mapping[str, MaskingResult] = field(default_factory=dict)
    examples: Sequence[ExampleView] = ()
    promoted: Mapping[tuple[int, int], NeuronTokens] = field(default_factory=dict)
    evaluation: Mapping[str, Interval | float | int | str] = field(default_factory=dict)
    held_out: HeldOutHeads | None = None
    steering: Mapping[str, SteeringTable] = field(default_factory=dict)
    overlap: Overlap | None = None
    groups: GroupMasking | None = None
    effects: Mapping[str, SideEffects] = field(default_factory=dict)
    lenses: Mapping[str, LensDifference] = field(default_factory=dict)
    flow: HeadNeuronFlow | None = None
    patching: PatchView | None = None

    @property
    def share(self) -> float:
        """The share of all neurons to which the headline numbers refer."""
        if self.neurons is None:
            return 0.01
        limited = self.neurons.layers is not None
        return self.neurons.count() / self.neurons.scores.numel() if limited else self.neurons.ratio

    @property
    def main(self) -> MaskingResult | None:
        """The masking result at that share, or at the nearest one."""
        return headline(self.masking, self.share) if self.masking else None
