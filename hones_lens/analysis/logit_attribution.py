"""Direct logit attribution: the contribution of each component to a logit, with the final norm folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hones_lens.interventions import Group, Hook, neuron_hook, token_mask
from hones_lens.model import (
    HookedVLM,
    ModelInput,
    VLMInputs,
    bare_text_ids,
    leading_blanks,
    require_choice,
    scale_hook,
    token_names,
    weighted,
)
from hones_lens.results import Labelled, mean_over_pairs

_Ids = int | Sequence[int] | Tensor
Token = str | _Ids
KINDS = ("layer", "component", "head", "neuron")


def direct_logit_attribution(
    model: HookedVLM,
    model_input: ModelInput,
    tokens: Token,
    foils: Token | None = None,
    *,
    by: str = "component",
    group: Group = "last",
    mean: bool = False,
    hooks: Sequence[Hook] = (),
) -> Labelled:
    """How much each component adds to a token's logit, or to the difference of two tokens' logits.

    What a component writes into the residual stream, divided by the final norm's scale, times its weight,
    times the token's column of W_U (HONES eq. H2 with `apply_ln`, for every component). The embedding and
    what the attention and the MLP of each layer write (and pictures, behind the first layers of a model with
    DeepStack) add up to the logit; a layer's heads add up to its attention, its neurons to its MLP.

    Args:
        model: The model.
        model_input: A batch.
        tokens: The token whose logit is attributed: text, an id, or one id per row. Of text of several
            tokens it is the first that tells it apart: from the foil where that is text too, else from white
            space. The result's notes say which.
        foils: Token whose logit is subtracted, given in the same ways.
        by: `layer` (attention, MLP and DeepStack together), `component` (apart), `head` or `neuron`.
        group: Positions to read; see `token_mask`.
        mean: Whether to average over the rows, with 95 % bootstrap intervals where there are several.
        hooks: Hooks of an intervention, active during the run.

    Returns:
        Labelled. Axes: `row` (unless `mean`); `position` where the group has several tokens in a row (NaN at
        those that a row does not have); then `layer`, `component`, `layer` and `head`, or `layer` and
        `neuron`. The first layer, or component, is called `embed`.

    Raises:
        ValueError: An unknown `by`, empty text, a text and a foil that no token tells apart, a count of ids
            that is not the batch, an empty group, or a mean over rows whose positions differ.
    """
    require_choice("kind of component", by, KINDS)
    inputs = model.as_inputs(model_input)
    run = _Attribution.of(model, by, tokens, foils, len(inputs))
    mask = token_mask(inputs, group)
    columns = mask.any(0).nonzero()[:, 0]
    contributions, logits = run.contributions(inputs, columns, hooks)
    in_group, labels = mask[:, columns].cpu(), {}
    if bool((mask.sum(-1) > 1).any()):
        labels["position"] = tuple(columns.tolist())
        outside = ~in_group.view(*in_group.shape, *[1] * (contributions.ndim - 2))
        contributions = contributions.masked_fill(outside, torch.nan)
        logits = logits.masked_fill(~in_group, torch.nan)
    else:
        rows, first_column = torch.arange(len(contributions)), in_group.int().argmax(1)
        contributions, logits = contributions[rows, first_column], logits[rows, first_column]
    if mean and not bool(torch.isfinite(logits).all()):
        raise ValueError("no mean over rows whose positions differ: take one row, or mean=False")
    return run.result(contributions, logits, labels, mean)


def _telling_tokens(
    model: HookedVLM, tokens: Token, foils: Token | None
) -> tuple[_Ids, _Ids | None, tuple[str, ...]]:
    """Ids in place of texts, and which tokens of these they are, as a line of text."""
    wholes = [_text_ids(model, side) if isinstance(side, str) else None for side in (tokens, foils)]
    (a, b), n = wholes, 0
    if a and b:
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
        if n < 0:
            raise ValueError(f"no token tells {tokens!r} from {foils!r}: give ids")
    told = [
        f"{text!r} is token {token_names(model, [whole[n]])[0]}, {n + 1} of {len(whole)}"
        for text, whole in zip((tokens, foils), wholes, strict=True)
        if whole
    ]
    notes = (f"{'; '.join(told)}.",) if told else ()
    answer = a[n] if a else tokens
    foil = b[n] if b else foils
    assert not isinstance(answer, str) and not isinstance(foil, str)
    return answer, foil, notes


def _text_ids(model: HookedVLM, text: str) -> list[int]:
    ids = bare_text_ids(model, text)
    if not ids:
        raise ValueError("empty text has no token")
    return ids[leading_blanks(model, ids) :]


def _ids(model: HookedVLM, tokens: _Ids, rows: int) -> Int[Tensor, " row"]:
    ids = torch.as_tensor(tokens, device=model.cfg.device)
    if ids.shape not in ((), (rows,)):
        raise ValueError(f"tokens of shape {tuple(ids.shape)} for a batch of {rows} rows: give one a row")
    if int(ids.min()) < 0 or int(ids.max()) >= model.cfg.d_vocab:
        raise ValueError(f"token ids {ids.tolist()} are not all in 0 … {model.cfg.d_vocab - 1}")
    return ids.expand(rows)


@dataclass(frozen=True)
class _Attribution:
    """One attribution: the model, the kind of component, and the target tokens by row.

    `notes` are lines for the result.
    """

    model: HookedVLM
    by: str
    answers: Int[Tensor, " row"]
    foils: Int[Tensor, " row"] | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: HookedVLM, by: str, tokens: Token, foils: Token | None, rows: int) -> _Attribution:
        """The attribution to tokens as they are given to `direct_logit_attribution`."""
        answer, foil, notes = _telling_tokens(model, tokens, foils)
        foil_ids = None if foil is None else _ids(model, foil, rows)
        return cls(model, by, _ids(model, answer, rows), foil_ids, notes)

    @torch.no_grad()
    def contributions(
        self, inputs: VLMInputs, columns: Int[Tensor, " column"], hooks: Sequence[Hook]
    ) -> tuple[Tensor, Tensor]:
        """Contributions of the components [row column …], and the model's logits [row column]."""
        direction = self._direction()
        kept: dict[str, Tensor] = {}
        reads = self._readers()

        def keep(x: Tensor, hook: Any) -> None:
            read = reads.get(hook.name)
            kept[hook.name] = (
                x[:, columns].float() if read is None else read(x[:, columns].float(), direction)
            )

        post_scales = self._post_scales()
        watch: list[Hook] = [(name, keep) for name in ("ln_final.hook_scale", *reads, *post_scales.values())]
        with self.model.hooks(fwd_hooks=[*hooks, *watch]):
            logits = self.model(inputs, logits_to_keep=columns).float()
        for name, scale_name in post_scales.items():
            kept[name] = kept[name] / kept[scale_name]
        contributions = torch.stack([kept[name] for name in reads], dim=2)  # [row column part …]
        scale = kept["ln_final.hook_scale"]
        contributions = contributions / scale.view(*scale.shape, *[1] * (contributions.ndim - 3))
        if self.by == "layer":
            counts = [1, *(len(self._parts(layer)) for layer in range(self.model.cfg.n_layers))]
            contributions = torch.stack([x.sum(2) for x in torch.split(contributions, counts, dim=2)], dim=2)
        return contributions.cpu(), self._target_logits(logits).cpu()

    def _direction(self) -> Float[Tensor, "row d_model"]:
        """Direction of the target logit in the normalised stream, with the final norm's weight folded in."""
        direction = self.model.tokens_to_residual_directions(self.answers).float()
        if self.foils is None:
            return direction
        return direction - self.model.tokens_to_residual_directions(self.foils).float()

    def _readers(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """By hook name: a function from an activation and the direction to contributions before the norm."""
        layers = range(self.model.cfg.n_layers)
        if self.by == "head":
            return {f"blocks.{layer}.attn.hook_z": self._heads(layer) for layer in layers}
        if self.by == "neuron":
            return {neuron_hook(layer): self._neurons(layer) for layer in layers}
        writes = [f"blocks.{layer}.{hook}" for layer in layers for hook in self._parts(layer).values()]
        return dict.fromkeys(["hook_embed", *writes], _along_direction)

    def _post_scales(self) -> dict[str, str]:
        """For what is read before a norm of what the heads or the neurons write: the hook of its scale."""
        layers = range(self.model.cfg.n_layers)
        if self.by not in ("head", "neuron"):
            return {}
        read, part = ("attn.hook_z", "attn") if self.by == "head" else ("mlp.hook_post", "mlp")
        found = {f"blocks.{i}.{read}": scale_hook(self.model.blocks[i], i, part) for i in layers}
        return {name: scale for name, scale in found.items() if scale is not None}

    def _parts(self, layer: int) -> dict[str, str]:
        """What writes into the stream in a layer, and the hook of what it writes."""
        parts = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
        return parts | ({"deepstack": "hook_deepstack"} if layer < self.model.cfg.n_deepstack else {})

    def _heads(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        block = self.model.blocks[layer]
        w_o = block.attn.W_O

        def read(z: Float[Tensor, "row column head d_head"], direction: Tensor) -> Tensor:
            along = torch.einsum("hdm,rm->rhd", w_o.float(), weighted(block, "attn", direction))
            return torch.einsum("rchd,rhd->rch", z, along)

        return read

    def _neurons(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        block = self.model.blocks[layer]
        w_out = block.mlp.W_out

        def read(neurons: Float[Tensor, "row column d_mlp"], direction: Tensor) -> Tensor:
            return neurons * (weighted(block, "mlp", direction) @ w_out.float().T)[:, None]

        return read

    def _target_logits(self, logits: Float[Tensor, "row column d_vocab"]) -> Float[Tensor, "row column"]:
        rows = torch.arange(len(logits), device=logits.device)
        target_logits = logits[rows, :, self.answers]
        return target_logits if self.foils is None else target_logits - logits[rows, :, self.foils]

    def result(
        self, contributions: Tensor, logits: Tensor, labels: dict[str, tuple[Any, ...]], mean: bool
    ) -> Labelled:
        """The result, from contributions [row …] and logits [row …]; NaN where a row lacks a position."""
        layers = range(self.model.cfg.n_layers)
        if self.by == "component":
            labels["component"] = ("embed", *(f"{part} {i}" for i in layers for part in self._parts(i)))
        if self.by == "layer":
            labels["layer"] = ("embed", *layers)
        inner = ("layer", self.by) if self.by in ("head", "neuron") else (self.by,)
        axes = (*(("position",) if "position" in labels else ()), *inner)
        quantity = "logit" if self.foils is None else "logit difference"
        total = float(contributions.nansum() / logits.isfinite().sum())
        note = f"Mean {quantity} {float(logits.nanmean()):.4g}; the {self.by}s shown add up to {total:.4g}."
        if self.by in ("head", "neuron"):
            rest = "the embedding and the MLPs" if self.by == "head" else "the embedding and the heads"
            rest += " (and what pictures write behind the first layers)" if self.model.cfg.n_deepstack else ""
            note += f" The rest is {rest}."
        quantity, notes = f"added to the {quantity} by each {self.by}", (note, *self.notes)
        if not mean:
            return Labelled(quantity, contributions, ("row", *axes), labels, notes=notes)
        return Labelled(quantity, axes=axes, labels=labels, notes=notes, **mean_over_pairs(contributions))


def _along_direction(
    x: Float[Tensor, "row column d_model"], direction: Tensor
) -> Float[Tensor, "row column"]:
    return torch.einsum("rcm,rm->rc", x, direction)
