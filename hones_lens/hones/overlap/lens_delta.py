"""What neurons make a model want to say, layer by layer: logit-lens tables of baseline minus masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import ClassVar, Unpack

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.analysis import (
    LensToken,
    delta_frame,
    delta_lines,
    largest_deltas,
    residual_streams,
    summed_logits,
    with_intervals,
)
from hones_lens.data import Example
from hones_lens.engine import BatchKeywords, SweepOptions
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons
from hones_lens.hones.overlap.groups import check_neurons
from hones_lens.interventions import Hook, zero_neurons
from hones_lens.model import HookedVLM
from hones_lens.results import Result
from hones_lens.tasks import Task


@dataclass(frozen=True, repr=False)
class LensDelta(Result):
    """The tokens whose logit-lens logit changes most when neurons are masked (HONES eq. H6).

    Attributes:
        task, model_name: What was asked of which model.
        n_neurons, n_examples: How many were masked, and how many examples the means are over.
        falls: By layer, the tokens that fall most: what the neurons speak for, `delta` above 0.
        rises: By layer, the tokens that rise most: what they speak against, `delta` below 0.
            Both are empty below the first masked neuron.
    """

    kind: ClassVar[str] = "lens-delta"

    task: str
    model_name: str
    n_neurons: int
    n_examples: int
    falls: tuple[tuple[LensToken, ...], ...]
    rises: tuple[tuple[LensToken, ...], ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a token: layer, direction (`falls` or `rises`), rank from 1, id, token, delta, ends."""
        return delta_frame(range(len(self.falls)), self.falls, self.rises)

    def __str__(self) -> str:
        head = (
            f"{self.model_name}, {self.task}: logit lens at the last prompt position, baseline minus masked "
            f"({self.n_neurons} neurons, mean over n = {self.n_examples} examples, 95 % intervals)"
        )
        return "\n".join([head, *delta_lines(range(len(self.falls)), self.falls, self.rises)])

    def _repr_html_(self) -> str:
        """A table of tokens: one row a layer, what falls and what rises in it."""
        rows = [
            f"<tr><th>{layer}</th><td>{_tokens(falls)}</td><td>{_tokens(rises)}</td></tr>"
            for layer, (falls, rises) in enumerate(zip(self.falls, self.rises, strict=True))
        ]
        caption = f"{self.model_name}, {self.task}: logit lens, baseline minus masked "
        caption += f"({self.n_neurons:,} neurons, mean over n = {self.n_examples:,} examples, 95 % intervals)"
        head = "<tr><th>layer</th><th>falls when masked</th><th>rises when masked</th></tr>"
        return f"<table><caption>{escape(caption)}</caption>{head}{''.join(rows)}</table>"


def _tokens(tokens: Sequence[LensToken]) -> str:
    cells = (f"<code>{escape(token.token)}</code>&nbsp;{token.delta:+.3g} {token.span}" for token in tokens)
    return " ".join(cells) or "–"


def lens_delta(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    neurons: NeuronScores | Neurons,
    *,
    k: int = 10,
    options: SweepOptions | None = None,
    **batches: Unpack[BatchKeywords],
) -> LensDelta:
    """Logit-lens tables of baseline minus masked (HONES eq. H6).

    For each layer: `unembed(ln_final(resid_post))` at the last prompt position, of the clean model
    minus that of the model with the neurons set to zero at all positions, mean over the examples.

    Args:
        model: The model.
        task: A task or its name; of a ranking task the prompt with the true candidate is taken.
        examples: Whose prompts.
        neurons: A ranking, whose share `ratio` is masked, or a list of (layer, index).
        k: Tokens a layer and direction.
        options, batches: How it runs: `batch_size` and `progress` of `SweepOptions`.

    Raises:
        ValueError: No examples, no neurons, one twice or one that the model does not have, k below 1.
        FloatingPointError: A logit that is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    options, task = SweepOptions.of_batches(options, batches), engine.as_task(task)
    engine.check_examples(task, examples)
    selected = neurons.top() if isinstance(neurons, NeuronScores) else neurons
    chosen = check_neurons(selected, model.cfg.n_layers, model.cfg.d_mlp, "the list of neurons to mask")
    streams: list[tuple[Tensor, Tensor]] = []  # of every batch, clean and masked
    with tqdm(total=len(examples), desc=f"logit lens · {task.name}", disable=not options.progress) as bar:
        for batch in engine.answer_batches(model, task, examples, options.batch_size, answers=False):
            streams.append((last_streams(model, batch), last_streams(model, batch, zero_neurons(chosen))))
            bar.update(len(batch.examples))
    clean, masked = (torch.cat(arm, dim=1) for arm in zip(*streams, strict=True))
    mean = (summed_logits(model, clean) - summed_logits(model, masked)) / len(examples)
    if not bool(torch.isfinite(mean).all()):
        raise FloatingPointError(f"logit-lens logits of {task.name} are not finite")

    def table(sign: int) -> tuple[tuple[LensToken, ...], ...]:
        return tuple(
            with_intervals(model, largest_deltas(model, delta, k, sign), clean_streams, masked_streams)
            for delta, clean_streams, masked_streams in zip(mean, clean, masked, strict=True)
        )

    return LensDelta(
        task=task.name,
        model_name=model.cfg.model_name,
        n_neurons=len(chosen),
        n_examples=len(examples),
        falls=table(1),
        rises=table(-1),
    )


@torch.no_grad()
def last_streams(
    model: HookedVLM, batch: engine.Batch, hooks: Sequence[Hook] = ()
) -> Float[Tensor, "layer example d_model"]:
    """The residual stream after every layer at the last prompt position."""
    return residual_streams(model, batch.inputs, batch.inputs.token_groups["last"], hooks)[1:]
