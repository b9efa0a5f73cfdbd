"""Factors of some neurons: hooks that apply them, and files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons, select_neurons
from hones_lens.interventions import Hook, by_layer, neuron_hook, scale
from hones_lens.model import HookedVLM
from hones_lens.results import Result, write_json


def neurons_to_steer(model: HookedVLM, neurons: NeuronScores | Neurons, k: int | None = None) -> Neurons:
    """The neurons to steer, as `masking.select_neurons` gives them.

    Raises:
        ValueError: No neurons, one that the model does not have, or one that occurs twice.
    """
    chosen = select_neurons(model, neurons, k, "steer")
    seen: set[tuple[int, int]] = set()
    for layer, index in chosen:
        if (layer, index) in seen:
            raise ValueError(f"neuron L{layer}N{index} occurs twice")
        seen.add((layer, index))
    return chosen


def scaling_hooks(neurons: Neurons, factors: Float[Tensor, " neuron"]) -> list[Hook]:
    """Hooks for `m_i ← factor_i · m_i` at all positions, one a layer (HONES eq. H5).

    Raises:
        ValueError: No neurons, or another number of factors.
    """
    if len(factors) != len(neurons):
        raise ValueError(f"{len(factors)} factors for {len(neurons)} neurons")
    factor_indices: dict[int, list[int]] = {}
    for i, (layer, *_) in enumerate(neurons):
        factor_indices.setdefault(layer, []).append(i)
    return [
        scale(neuron_hook(layer), index, factors[factor_indices[layer]])
        for layer, index in by_layer(neurons).items()
    ]


@dataclass(frozen=True, repr=False)
class NeuronScales(Result):
    """Some neurons and how they are scaled.

    Attributes:
        neurons: Which, as (layer, index).
        offsets: a_i of HONES eq. H5, by neuron: m_i becomes (1 + a_i) m_i.
        task, method, model_name: For what, by what, and whose; empty where it is not known.
        settings: What they were learned with.
        n_examples: How many examples they were learned on.
        history: By epoch: the mean loss and its parts, max |a|, and what was measured on dev.
    """

    kind: ClassVar[str] = "scales"

    neurons: tuple[tuple[int, int], ...]
    offsets: tuple[float, ...]
    task: str = ""
    method: str = ""
    model_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    n_examples: int = 0
    history: tuple[dict[str, float], ...] = ()

    def __post_init__(self) -> None:
        if len(self.neurons) != len(self.offsets):
            raise ValueError(f"{len(self.offsets)} offsets for {len(self.neurons)} neurons")
        if len(set(self.neurons)) < len(self.neurons):
            raise ValueError("a neuron occurs twice")

    @classmethod
    def uniform(cls, neurons: Neurons, factor: float, **about: Any) -> NeuronScales:
        """The same factor for all neurons."""
        chosen = tuple((n[0], n[1]) for n in neurons)
        return cls(chosen, (factor - 1,) * len(chosen), **about)

    @property
    def factors(self) -> Float[Tensor, " neuron"]:
        """What each neuron is multiplied by, 1 + a_i, in float32."""
        return 1 + torch.tensor(self.offsets, dtype=torch.float32)

    @property
    def max_abs(self) -> float:
        """The largest |a_i|: how far the model was moved at most."""
        return max(map(abs, self.offsets), default=0.0)

    def hooks(self) -> list[Hook]:
        """Hooks (name, fn) for `run_with_hooks`, `hooks` or a sweep.

        Raises:
            ValueError: No neurons.
        """
        return scaling_hooks(self.neurons, self.factors)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, scale (1 + a)."""
        rows = [(*n, 1 + a) for n, a in zip(self.neurons, self.offsets, strict=True)]
        return pd.DataFrame(rows, columns=["layer", "neuron", "scale"])

    def save_hones(self, file: str | Path) -> None:
        """Write HONES's own `neuron_scales.json`: a list of {layer, neuron, scale}, scale = 1 + a."""
        write_json(file, self.to_dataframe().to_dict("records"))

    @classmethod
    def load(cls, file: str | Path) -> NeuronScales:
        """Read what `save` or `save_hones` wrote, or HONES's own `neuron_scales.json`.

        Raises:
            ValueError: Another kind of file, or a record that lacks layer, neuron or scale.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(data, list):
            return super().load(file)
        for i, record in enumerate(data):
            if not (isinstance(record, dict) and {"layer", "neuron", "scale"} <= record.keys()):
                raise ValueError(f"{file}: record {i} is not of the form {{layer, neuron, scale}}: {record}")
        neurons = tuple((int(r["layer"]), int(r["neuron"])) for r in data)
        return cls(neurons, tuple(float(r["scale"]) - 1 for r in data))

    def __str__(self) -> str:
        n = len(self.neurons)
        prefix = f"{self.model_name}, {self.task}: " if self.model_name else ""
        lines = [
            f"{prefix}{n} neurons scaled by {self.method or 'given factors'}, max |a| {self.max_abs:.4g}"
        ]
        order = sorted(range(n), key=lambda i: (-abs(self.offsets[i]), self.neurons[i]))
        lines += [
            f"  L{self.neurons[i][0]}N{self.neurons[i][1]:<5} × {1 + self.offsets[i]:.4f}" for i in order[:20]
        ]
        return "\n".join([*lines, "  …"] if n > 20 else lines)
