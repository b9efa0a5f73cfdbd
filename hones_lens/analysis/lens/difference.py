"""The difference lens: how an intervention changes the logit-lens logits of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.lens.streams import layer_names, residual_streams, summed_logits, token_logits
from hones_lens.interventions import Group, Hook, group_name, token_mask
from hones_lens.model import HookedVLM, ModelInput, takes_iterables, token_names
from hones_lens.results import Result, mean_interval


class LensToken(NamedTuple):
    """A token of the vocabulary, and its logit-lens logit, baseline minus intervention.

    `low` and `high` are the ends of the 95 % bootstrap interval of `delta` over rows or examples; None with
    fewer than two. Tokens are chosen for a large delta, so the interval says how sure its size is, not that
    the token was picked with foresight.
    """

    id: int
    token: str
    delta: float
    low: float | None = None
    high: float | None = None

    @property
    def span(self) -> str:
        """The interval as text, such as `[+0.12, +0.34]`; empty where there is none."""
        return "" if self.low is None else f"[{self.low:+.3g}, {self.high:+.3g}]"


Tables = tuple[tuple[LensToken, ...], ...]  # by layer


@dataclass(frozen=True, repr=False)
class LensDifference(Result):
    """The tokens whose logit-lens logit changes most under an intervention.

    Attributes:
        model_name: Name of the model.
        n_examples: Number of examples, or rows of a batch, that the means are taken over.
        falls: By layer, the tokens whose logit falls most under the intervention (`delta` above 0).
        rises: By layer, the tokens whose logit rises most under the intervention (`delta` below 0).
            Both are empty in layers below the intervention.
        layers: Labels of the layers; None: their numbers.
        group: Token group whose positions were read; None: the last prompt position.
        task, n_neurons: Of neurons that were masked: the task, and how many they were.
    """

    kind: ClassVar[str] = "lens-delta"

    model_name: str
    n_examples: int
    falls: Tables
    rises: Tables
    layers: tuple[Any, ...] | None = None
    group: str | None = None
    task: str | None = None
    n_neurons: int | None = None

    @property
    def rows(self) -> list[tuple[Any, tuple[LensToken, ...], tuple[LensToken, ...]]]:
        """Of every layer its label, and the tokens that fall and that rise."""
        labels = range(len(self.falls)) if self.layers is None else self.layers
        return list(zip(labels, self.falls, self.rises, strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token: layer, direction (`falls` or `rises`), rank from 1, id, token, delta, ends."""
        rows = [
            {"layer": layer, "direction": direction, "rank": rank, **token._asdict()}
            for layer, *tables in self.rows
            for direction, table in zip(("falls", "rises"), tables, strict=True)
            for rank, token in enumerate(table, start=1)
        ]
        return pd.DataFrame(rows, columns=["layer", "direction", "rank", *LensToken._fields])

    @property
    def title(self) -> str:
        """What was compared, where and over how many."""
        model = self.model_name if self.task is None else f"{self.model_name}, {self.task}"
        where = "the last prompt position" if self.group is None else repr(self.group)
        change, examples = "intervention", f"mean over n = {self.n_examples:,} rows"
        if self.n_neurons is not None:
            change = "masked"
            examples = f"{self.n_neurons:,} neurons, mean over n = {self.n_examples:,} examples"
        return f"{model}: logit lens at {where}, baseline minus {change} ({examples}, 95 % intervals)"

    def __str__(self) -> str:
        lines = [self.title]
        for layer, *tables in self.rows:
            for direction, table in zip(("falls", "rises"), tables, strict=True):
                entries = "  ".join(
                    f"{token.token} {token.delta:+.3g} {token.span}".rstrip() for token in table
                )
                lines.append(f"  layer {layer} {direction}: {entries or 'nothing'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A table with one row per layer: the tokens that fall and that rise."""
        rows = [
            f"<tr><th>{escape(str(layer))}</th><td>{_html(falls)}</td><td>{_html(rises)}</td></tr>"
            for layer, falls, rises in self.rows
        ]
        head = "<tr><th>layer</th><th>falls</th><th>rises</th></tr>"
        return f"<table><caption>{escape(self.title)}</caption>{head}{''.join(rows)}</table>"


def _html(tokens: Sequence[LensToken]) -> str:
    entries = (f"<code>{escape(token.token)}</code>&nbsp;{token.delta:+.3g} {token.span}" for token in tokens)
    return " ".join(entries) or "–"


@takes_iterables
@torch.no_grad()
def lens_difference(
    model: HookedVLM,
    model_input: ModelInput,
    hooks: Sequence[Hook],
    group: Group = "last",
    *,
    k: int = 10,
) -> LensDifference:
    """Logit-lens logits of a clean pass minus those of a pass under hooks; mean over the rows.

    For a whole data set with neurons masked there is `hones_lens.hones.lens_delta`.

    Args:
        model: The model.
        model_input: A batch.
        hooks: Hooks of the intervention.
        group: Positions to read; each row counts with the mean over its own positions.
        k: Number of tokens per layer and direction.

    Raises:
        ValueError: No hooks, k below 1, an empty or unknown group.
        FloatingPointError: A logit that is not finite.
    """
    if not hooks or k < 1:
        raise ValueError(f"k must be at least 1, not {k}" if hooks else "no hooks: nothing would differ")
    inputs = model.as_inputs(model_input)
    mask = token_mask(inputs, group)
    of_row = mask.nonzero()[:, 0]
    weights = (1 / mask.sum(-1).double() / len(mask))[of_row]
    clean, changed = (residual_streams(model, inputs, mask, given) for given in ([], hooks))
    deltas = summed_logits(model, clean, weights) - summed_logits(model, changed, weights)
    shares = torch.zeros(len(mask), len(of_row), dtype=torch.float64)
    shares[of_row.cpu(), torch.arange(len(of_row))] = len(mask) * weights.cpu()
    falls, rises = delta_tables(model, deltas, clean, changed, k, shares)
    layers, name = layer_names(model), group_name(group)
    return LensDifference(model.cfg.model_name, len(inputs), falls, rises, layers, name)


def delta_tables(
    model: HookedVLM,
    deltas: Float[Tensor, "layer d_vocab"],
    clean: Float[Tensor, "layer place d_model"],
    changed: Float[Tensor, "layer place d_model"],
    k: int,
    shares: Float[Tensor, "row place"] | None = None,
) -> tuple[Tables, Tables]:
    """The k tokens of every layer that fall most, and those that rise most, with intervals over rows.

    Args:
        model: The model.
        deltas: Mean logits over rows, clean minus changed.
        clean, changed: The residual streams that they were read from.
        k: Number of tokens per layer and direction.
        shares: What each place counts in the mean of each row; default: every place is a row.

    Raises:
        FloatingPointError: A logit that is not finite.
    """
    if not bool(torch.isfinite(deltas).all()):
        raise FloatingPointError("logit-lens logits are not finite")
    falls, rises = (
        tuple(
            _with_intervals(model, _largest_deltas(model, row, k, sign), before, after, shares)
            for row, before, after in zip(deltas, clean, changed, strict=True)
        )
        for sign in (1, -1)
    )
    return falls, rises


def _largest_deltas(
    model: HookedVLM, deltas: Float[Tensor, " d_vocab"], k: int, sign: int = 1
) -> tuple[LensToken, ...]:
    """The k largest (sign 1) or smallest (sign −1) deltas of that sign; ties in the vocabulary's order."""
    ids = torch.argsort(sign * deltas, descending=True, stable=True)[:k].tolist()
    ids = [i for i in ids if sign * float(deltas[i]) > 0]
    names = token_names(model, ids)
    return tuple(LensToken(i, name, float(deltas[i])) for i, name in zip(ids, names, strict=True))


def _with_intervals(
    model: HookedVLM,
    tokens: Sequence[LensToken],
    clean: Float[Tensor, "place d_model"],
    changed: Float[Tensor, "place d_model"],
    shares: Float[Tensor, "row place"] | None = None,
) -> tuple[LensToken, ...]:
    """Tokens of one layer with bootstrap intervals over rows; by default every place is a row."""
    rows = len(clean) if shares is None else len(shares)
    if not tokens or rows < 2:
        return tuple(tokens)
    ids = [token.id for token in tokens]
    deltas = token_logits(model, clean, ids) - token_logits(model, changed, ids)
    deltas = deltas if shares is None else shares @ deltas
    intervals = [mean_interval(column.numpy()) for column in deltas.T]
    return tuple(
        token._replace(low=interval.low, high=interval.high)
        for token, interval in zip(tokens, intervals, strict=True)
    )
