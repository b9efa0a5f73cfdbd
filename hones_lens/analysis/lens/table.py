"""The logit lens as a table: the most likely tokens after each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from hones_lens.analysis.lens.streams import layer_names, lens_logits, residual_streams
from hones_lens.interventions import Group, Hook, token_mask
from hones_lens.model import HookedVLM, ModelInput, takes_iterables, token_names
from hones_lens.results import Result

_MAX_PRINTED = 3  # positions shown when the result is printed


class LensPosition(NamedTuple):
    """A position of a batch, and the token there."""

    row: int
    position: int
    token: str

    def __str__(self) -> str:
        return f"row {self.row}, position {self.position}, {self.token!r}"


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """The most likely tokens after every layer at chosen positions; the first layer is `embed`.

    `plot(**options)` draws the first place as a grid of layers by tokens, `lens[i].plot()` another; options:
    of `hones_lens.viz.lens_grid`.

    Attributes:
        model_name: Name of the model.
        places: The positions, each with its row and token.
        layers: Labels of the layers.
        ids: Token ids, most likely first, [place layer k].
        tokens: The tokens as text, `tokens[place][layer][rank]`.
        logits, probabilities: Logits and probabilities of these tokens, [place layer k].
    """

    kind: ClassVar[str] = "logit-lens"

    model_name: str
    places: tuple[LensPosition, ...]
    layers: tuple[Any, ...]
    ids: Int[Tensor, "place layer k"]
    tokens: tuple[tuple[tuple[str, ...], ...], ...]
    logits: Float32[Tensor, "place layer k"]
    probabilities: Float32[Tensor, "place layer k"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> LogitLens:
        """The result at one position.

        Raises:
            IndexError: No such place.
        """
        if not -len(self) <= place < len(self):
            raise IndexError(f"there are {len(self)} places; there is no place {place}")
        index = [place % len(self)]
        fields = {name: getattr(self, name)[index] for name in ("ids", "logits", "probabilities")}
        return LogitLens(
            self.model_name, (self.places[index[0]],), self.layers, tokens=(self.tokens[index[0]],), **fields
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a token: row, position, at (the token there), layer, rank from 1, id, token, and so on."""
        rows = [
            {
                "row": place.row,
                "position": place.position,
                "at": place.token,
                "layer": layer,
                "rank": rank + 1,
                "id": int(self.ids[p, i, rank]),
                "token": token,
                "logit": float(self.logits[p, i, rank]),
                "probability": float(self.probabilities[p, i, rank]),
            }
            for p, place in enumerate(self.places)
            for i, layer in enumerate(self.layers)
            for rank, token in enumerate(self.tokens[p][i])
        ]
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [f"{self.model_name}: logit lens, tokens with their probabilities"]
        for p, place in enumerate(self.places[:_MAX_PRINTED]):
            lines.append(f"{place}:")
            width = max(len(str(layer)) for layer in self.layers)
            for i, layer in enumerate(self.layers):
                entries = zip(self.tokens[p][i], self.probabilities[p, i].tolist(), strict=True)
                cells = "  ".join(f"{token!r} {share:.2f}" for token, share in entries)
                lines.append(f"  {layer!s:>{width}}  {cells}")
        if len(self) > _MAX_PRINTED:
            lines.append(f"(the first {_MAX_PRINTED} of {len(self)} places)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Tables shaded by probability, tokens escaped, logits in tooltips."""
        return "".join(self._html_table(p) for p in range(min(len(self), _MAX_PRINTED)))

    def _html_table(self, p: int) -> str:
        rows = []
        for i, layer in enumerate(self.layers):
            cells = [f"<th>{escape(str(layer))}</th>"]
            for rank, token in enumerate(self.tokens[p][i]):
                share, logit = float(self.probabilities[p, i, rank]), float(self.logits[p, i, rank])
                shade = f"background: rgba(0, 114, 178, {0.6 * share:.3f})"
                tooltip = f"logit {logit:.3f}, probability {share:.4f}"
                cells.append(f'<td style="{shade}" title="{tooltip}">{escape(repr(token)[1:-1])}</td>')
            rows.append(f"<tr>{''.join(cells)}</tr>")
        head = f"{self.model_name}: {self.places[p]}"
        return f"<table><caption>{escape(head)}</caption>{''.join(rows)}</table>"


@takes_iterables
@torch.no_grad()
def logit_lens(
    model: HookedVLM,
    model_input: ModelInput,
    group: Group = "last",
    *,
    k: int = 10,
    hooks: Sequence[Hook] = (),
) -> LogitLens:
    """The k likeliest tokens of `unembed(ln_final(stream))` after every layer.

    Those of the last layer are the model's own predictions.

    Args:
        model: The model.
        model_input: A batch.
        group: Positions to read: the name of a token group, a `Box` or a mask [batch pos]; image tokens are
            allowed.
        k: Number of tokens per layer, at most the size of the vocabulary.
        hooks: Hooks of an intervention, active during the run.

    Raises:
        ValueError: k below 1 or above the size of the vocabulary; an empty or unknown group.
    """
    if not 1 <= k <= model.cfg.d_vocab:
        raise ValueError(f"k must lie in 1 … {model.cfg.d_vocab}, not {k}")
    inputs = model.as_inputs(model_input)
    mask = token_mask(inputs, group)
    top_by_layer = [_top(model, stream, k) for stream in residual_streams(model, inputs, mask, hooks)]
    ids, logits, shares = (torch.stack(part, dim=1).cpu() for part in zip(*top_by_layer, strict=True))
    rows, positions = (index.tolist() for index in mask.nonzero(as_tuple=True))
    position_tokens = token_names(model, inputs.input_ids[mask].tolist())
    return LogitLens(
        model.cfg.model_name,
        tuple(LensPosition(*place) for place in zip(rows, positions, position_tokens, strict=True)),
        layer_names(model),
        ids,
        tuple(tuple(tuple(token_names(model, layer)) for layer in place) for place in ids.tolist()),
        logits,
        shares,
    )


def _top(model: HookedVLM, stream: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, logits and probabilities of the k likeliest tokens, [place k] each."""
    parts = []
    for logits in lens_logits(model, stream):
        top = logits.topk(k, dim=-1)
        parts.append((top.indices, top.values, logits.softmax(-1).gather(-1, top.indices)))
    ids, values, shares = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, values, shares
