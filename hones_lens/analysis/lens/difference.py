"""The difference lens: how an intervention changes the logit-lens logits of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.analysis.lens.streams import layer_names, residual_streams, summed_logits, token_logits
from hones_lens.interventions import Group, Hook, group_name, token_mask
from hones_lens.model import HookedVLM, ModelInput, token_names
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
    """The tokens whose logit-lens logit changes most under an intervention; the first layer is `embed`.

    Attributes:
        model_name: Name of the model.
        group: Token group whose positions were read.
        n: Number of rows that the means are taken over.
        layers: Labels of the layers.
        falls: By layer, the tokens whose logit falls most under the intervention (`delta` above 0).
        rises: By layer, the tokens whose logit rises most under the intervention (`delta` below 0).
            Both are empty in layers below the intervention.
    """

    kind: ClassVar[str] = "lens-difference"

    model_name: str
    group: str
    n: int
    layers: tuple[Any, ...]
    falls: Tables
    rises: Tables

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token: layer, direction (`falls` or `rises`), rank from 1, id, token, delta, ends."""
        return delta_frame(self.layers, self.falls, self.rises)

    def __str__(self) -> str:
        head = (
            f"{self.model_name}: logit lens at {self.group!r}, baseline minus intervention "
            f"(mean over n = {self.n} rows, 95 % intervals)"
        )
        return "\n".join([head, *delta_lines(self.layers, self.falls, self.rises)])


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

    For a whole data set with neurons masked there is `hones_lens.hones.overlap.lens_delta`.

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
    pair = [residual_streams(model, inputs, mask, given) for given in ([], hooks)]
    clean, changed = (summed_logits(model, stream, weights) for stream in pair)
    deltas = clean - changed
    if not bool(torch.isfinite(deltas).all()):
        raise FloatingPointError("logit-lens logits are not finite")
    shares = torch.zeros(len(mask), len(of_row), dtype=torch.float64)
    shares[of_row.cpu(), torch.arange(len(of_row))] = len(mask) * weights.cpu()
    falls, rises = (
        tuple(
            with_intervals(model, largest_deltas(model, row, k, sign), before, after, shares)
            for row, before, after in zip(deltas, *pair, strict=True)
        )
        for sign in (1, -1)
    )
    name = group_name(group)
    return LensDifference(model.cfg.model_name, name, len(inputs), layer_names(model), falls, rises)


def largest_deltas(
    model: HookedVLM, deltas: Float[Tensor, " d_vocab"], k: int, sign: int = 1
) -> tuple[LensToken, ...]:
    """The k largest (sign 1) or smallest (sign −1) deltas of that sign; ties in the vocabulary's order."""
    ids = torch.argsort(sign * deltas, descending=True, stable=True)[:k].tolist()
    ids = [i for i in ids if sign * float(deltas[i]) > 0]
    names = token_names(model, ids)
    return tuple(LensToken(i, name, float(deltas[i])) for i, name in zip(ids, names, strict=True))


def with_intervals(
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


def delta_frame(layers: Sequence[Any], falls: Tables, rises: Tables) -> pd.DataFrame:
    """One row per token: layer, direction, rank from 1, id, token, delta, low and high."""
    rows = [
        {"layer": layer, "direction": direction, "rank": rank, **token._asdict()}
        for i, layer in enumerate(layers)
        for direction, table in (("falls", falls), ("rises", rises))
        for rank, token in enumerate(table[i], start=1)
    ]
    return pd.DataFrame(rows, columns=["layer", "direction", "rank", *LensToken._fields])


def delta_lines(layers: Sequence[Any], falls: Tables, rises: Tables) -> list[str]:
    """Two lines of text per layer, for terminals."""
    lines = []
    for layer, *tables in zip(layers, falls, rises, strict=True):
        for name, table in zip(("falls", "rises"), tables, strict=True):
            entries = "  ".join(f"{token.token} {token.delta:+.3g} {token.span}".rstrip() for token in table)
            lines.append(f"  layer {layer} {name}: {entries or 'nothing'}")
    return lines
