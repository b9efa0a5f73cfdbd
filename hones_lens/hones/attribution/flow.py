"""Head → neuron → token: which critical heads the task neurons owe their importance to, and what these write.

The terms of HONES eq. H3, kept apart by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens import engine
from hones_lens.analysis import promoted_tokens
from hones_lens.data import Example
from hones_lens.engine import ResumedKeywords, SweepOptions, split_keywords
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.attribution.neurons import default_ratio, write_in_drops_by_head
from hones_lens.hones.attribution.rankings import mean_activation
from hones_lens.model import HookedVLM, takes_iterables, token_names
from hones_lens.results import Component, Result
from hones_lens.tasks import Task


class PromotedToken(NamedTuple):
    """A token, and what a unit of a neuron's activation adds to its logit, before the final norm's scale."""

    token: str
    logit: float


@dataclass(frozen=True, eq=False, repr=False)
class HeadNeuronFlow(Result):
    """From which heads the task neurons have their importance, and which tokens they promote.

    `plot(**options)` draws heads, neurons and tokens with links as wide as the contributions; options: of
    `hones_lens.viz.head_neuron_token_flow`.

    Attributes:
        task, model_name: What was asked of which model.
        heads: Critical heads as (layer, index, w).
        neurons: Task neurons as (layer, index, importance), best first.
        contributions: What of a neuron's importance comes through a head, `w_h [E c − E c under I_h]₊ / Σ w`
            (HONES eq. H3), [head neuron]; sums over heads are the neurons' importance.
        total: The importance of all neurons of the model together.
        activations: Mean activation of each neuron at the last prompt position, [neuron].
        promoted: By neuron the tokens that it promotes most when it is as active as that: of a neuron whose
            mean activation is negative, those that its output row suppresses (`promoted_tokens`).
        n_examples: How many examples it rests on.
    """

    kind: ClassVar[str] = "head-neuron-flow"

    task: str
    model_name: str
    heads: tuple[Component, ...]
    neurons: tuple[Component, ...]
    contributions: Float[Tensor, "head neuron"]
    total: float
    activations: Float[Tensor, " neuron"]
    promoted: tuple[tuple[PromotedToken, ...], ...]
    n_examples: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head and neuron: their places, contribution, mean activation and most promoted token."""
        rows = [
            {
                "head_layer": head.layer,
                "head": head.index,
                "neuron_layer": neuron.layer,
                "neuron": neuron.index,
                "contribution": float(self.contributions[h, n]),
                "activation": float(self.activations[n]),
                "promotes": self.promoted[n][0].token,
            }
            for n, neuron in enumerate(self.neurons)
            for h, head in enumerate(self.heads)
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        share = float(self.contributions.sum()) / (self.total or 1.0)
        lines = [
            f"{self.model_name}, {self.task}: {len(self.heads)} critical heads → {len(self.neurons)} "
            f"neurons, {share:.0%} of the importance of all (n = {self.n_examples})"
        ]
        for n, neuron in enumerate(self.neurons[:20]):
            best = self.contributions[:, n].argsort(descending=True, stable=True)[:3].tolist()
            share = self.contributions[:, n] / self.contributions[:, n].sum().clamp(min=1e-300)
            heads = ", ".join(f"L{self.heads[h].layer}H{self.heads[h].index} {share[h]:.0%}" for h in best)
            tokens = ", ".join(repr(promoted.token) for promoted in self.promoted[n][:3])
            sign = "−" if float(self.activations[n]) < 0 else "+"
            name = f"L{neuron.layer}N{neuron.index}"
            lines.append(f"  {heads} → {name} {neuron.score:+.4g}, active {sign} → {tokens}")
        return "\n".join([*lines, "  …"] if len(self.neurons) > 20 else lines)

    def _repr_html_(self) -> str:
        return self.to_dataframe().head(20).to_html(index=False)


@takes_iterables
def head_neuron_flow(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    heads: HeadScores,
    neurons: NeuronScores | None = None,
    *,
    ratio: float | None = None,
    tokens: int = 5,
    options: SweepOptions | None = None,
    **keywords: Any,
) -> HeadNeuronFlow:
    """From which critical heads the task neurons have their importance (HONES eq. H3), and what they write.

    Args:
        model: The model.
        task: A task or its name.
        examples: The discovery examples.
        heads: Critical heads: their stored top_k with w > 0 are used.
        neurons: A ranking whose task neurons are looked at; default: the ranking by eq. H3 itself.
        ratio: Share of all neurons that are task neurons; default: the ranking's, or from `model_configs/`.
        tokens: How many promoted tokens of each neuron to keep.
        options: How it runs, as `SweepOptions`.
        keywords: `batch_size` (default 16), `progress` and `journal` of `SweepOptions`; `normalize`,
            `apply_ln`, `foils` of `target_directions`.

    Raises:
        ValueError: No examples, no critical head with w > 0, scores of another shape, or too many tokens.
    """
    if not 1 <= tokens <= model.cfg.d_vocab:
        raise ValueError(f"tokens must lie in 1 … {model.cfg.d_vocab}, not {tokens}")
    task = engine.as_task(task)
    engine.check_examples(task, examples)
    shape = (model.cfg.n_layers, model.cfg.d_mlp)
    if neurons is not None and tuple(neurons.scores.shape) != shape:
        raise ValueError(f"neuron scores {tuple(neurons.scores.shape)} for a model of {shape} neurons")
    batch_keywords, direction_keywords = split_keywords(keywords, ResumedKeywords.__annotations__)
    options = SweepOptions.of_resumed(options, batch_keywords, batch_size=16)
    critical = [head for head in heads.top() if head.score > 0]
    direction_keywords |= options.of_resumed_batches
    weights, drops = write_in_drops_by_head(model, task, examples, critical, **direction_keywords)
    by_head = weights[:, None, None] * drops / weights.sum()
    scores = by_head.sum(0)
    if neurons is None:
        share = default_ratio(model) if ratio is None else ratio
        neurons = NeuronScores(task.name, "hones", model.cfg.model_name, scores, share, len(examples))
    chosen = neurons.top(neurons.count(ratio))
    where = tuple(torch.tensor([[c.layer, c.index] for c in chosen]).T)
    activations = mean_activation(model, task, examples, signed=True, **options.of_resumed_batches)[where]
    return HeadNeuronFlow(
        task=task.name,
        model_name=model.cfg.model_name,
        heads=tuple(critical),
        neurons=tuple(c._replace(score=float(scores[c.layer, c.index])) for c in chosen),
        contributions=by_head[:, where[0], where[1]],
        total=float(scores.sum()),
        activations=activations,
        promoted=_promoted(model, chosen, activations, tokens),
        n_examples=len(examples),
    )


def _promoted(
    model: HookedVLM, neurons: Sequence[Component], activations: Float[Tensor, " neuron"], k: int
) -> tuple[tuple[PromotedToken, ...], ...]:
    """The k tokens that each neuron promotes most, by name."""
    top_tokens = promoted_tokens(model, [(c.layer, c.index) for c in neurons], activations, k)
    return tuple(
        tuple(PromotedToken(*pair) for pair in zip(token_names(model, ids), logits, strict=True))
        for ids, logits in zip(top_tokens.ids.tolist(), top_tokens.logits.tolist(), strict=True)
    )
