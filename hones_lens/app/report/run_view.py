"""What a report shows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from hones_lens.analysis import LogitLens
from hones_lens.app.report.verdict import headline
from hones_lens.hones import (
    GroupMasking,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    LensDelta,
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
    """One example, for showing.

    Attributes:
        image: The picture.
        prompt, target: What was asked, and the right answer.
        answer, answer_masked: What the model says, as it is and with neurons masked; None: not asked.
        head: Whose attention is shown at first, e.g. `L3H5`.
        masked_label: What was masked, e.g. `76 neurons masked`.
        attention_from: The token that looks.
        region: The part of the picture that the grids show; None: all of it.
        looks: By head that can be chosen: its attention from one token to the image, [rows columns].
        lens: The likeliest tokens after every layer at the last prompt token.
        image_lens: How much the image tokens speak for the right answer, by layer, row and column.
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
    """The first pair of a patching, for showing.

    Attributes:
        id, prompt, answer: What was asked of the clean picture, and the token that is right there.
        clean: The clean picture.
        foil: The token that is right on the corrupted input; None where there is no other answer.
        corrupted: The corrupted picture, where it is one.
        inputs: Where the picture's patches lie among the positions.
    """

    id: str
    prompt: str
    answer: str
    clean: Image.Image
    foil: str | None
    corrupted: Image.Image | None
    inputs: VLMInputs


@dataclass(frozen=True, eq=False)
class PatchView:
    """One patching.

    Attributes:
        result: What it changed.
        options: Of `patch_activations`: `what`, `by`, `direction`, `metric`, `raw`.
        pairs: What was patched, in words, e.g. `64 counterfactual pairs of vqa`.
        pair: The first of them; None where it was not kept.
    """

    result: Labelled
    options: Mapping[str, Any]
    pairs: str
    pair: PairView | None = None


class NeuronTokens(NamedTuple):
    """The tokens that a neuron promotes most, so active as its mean activation at the last prompt position.

    Without a mean activation they are those that its output row raises, whichever way it is active.
    """

    tokens: tuple[str, ...]
    activation: float | None = None


@dataclass(frozen=True, eq=False)
class RunView:
    """All that a report shows of one run; what is missing is left out.

    Attributes:
        title: Heading.
        model_name, task, metric_name: What was studied.
        settings, environment: Names and values; mappings may be nested.
        heads: HONES eq. H1.
        neurons: HONES eqs. H2 and H3.
        masking: HONES eq. H4, at one or several shares.
        others: By name: other rankings masked at the same budget.
        examples: Pictures with the attention of a head.
        promoted: By (layer, index): the tokens that a neuron promotes most.
        evaluation: The model before anything is changed, e.g. {"accuracy": Interval, "examples": 200}.
        held_out: The critical heads measured again on examples that did not select them.
        steering: HONES eq. H5, by what they are called on the page, e.g. `learned and measured on shapes`.
        overlap, groups: HONES eq. H6: which neurons tasks share, and each group of them masked.
        effects: By data set: every task under the scales of every task.
        lenses: By task: what its neurons make the model want to say.
        flow: From the critical heads through the neurons to the tokens that these promote.
        patching: One activation patching.
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
    lenses: Mapping[str, LensDelta] = field(default_factory=dict)
    flow: HeadNeuronFlow | None = None
    patching: PatchView | None = None

    @property
    def share(self) -> float:
        """The share of all neurons that headline numbers are about."""
        return self.neurons.ratio if self.neurons else 0.01

    @property
    def main(self) -> MaskingResult | None:
        """The masking result at that share, or the nearest."""
        return headline(self.masking, self.share) if self.masking else None
