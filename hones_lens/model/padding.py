"""Padding in token ids that come without an attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.typed import to_list

_GIVE_A_MASK = "; pass a mapping with 'attention_mask', or what model.prepare returns"


class KnowsPadding(Protocol):
    """The part of a model that finding padding needs; `processor` is None if none was given."""

    processor: Any

    @property
    def cfg(self) -> VLMConfig:
        """Padding and end-of-sequence ids."""
        ...


def find_attention_mask(model: KnowsPadding, ids: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """1 at tokens, 0 at the padding on the left and on the right of each row.

    A padding token between other tokens is text. As in TransformerLens, the last of the padding tokens on the
    left is the beginning-of-sequence token where the two are one token. Where the padding token also ends
    sequences, those on the right are text if every row ends in exactly one.

    Raises:
        ValueError: A row of padding alone, or ids that can't be told from padding: several end-of-sequence
            or beginning-of-sequence tokens, or an ordinary token that stands in for padding in a vocabulary
            that has none; names the row.
    """
    tokenizer = None if model.processor is None else model.processor.tokenizer
    tokenizer_pad: int | None = getattr(tokenizer, "pad_token_id", None)
    pad_ids = {model.cfg.pad_token_id, model.cfg.pad_token_id if tokenizer_pad is None else tokenizer_pad}
    is_pad = torch.isin(ids, torch.tensor(sorted(pad_ids), device=ids.device))
    on_left = is_pad.cumprod(-1).bool()
    on_right = is_pad.flip(-1).cumprod(-1).flip(-1).bool() & ~on_left
    if not bool((on_left | on_right).any()):
        return torch.ones_like(ids)
    on_left = _without_bos(ids, on_left, getattr(tokenizer, "bos_token_id", None))
    on_right = _without_eos(ids, on_right, _main_eos(model.cfg, tokenizer))
    padding = on_left | on_right
    if (row := _first(padding.all(-1))) is not None:
        raise ValueError(f"row {row} of the tokens is padding alone{_GIVE_A_MASK}")
    for token in sorted(pad_ids):
        row = _first((padding & (ids == token)).any(-1))
        if row is not None and not _is_special(model.cfg, tokenizer, token):
            raise ValueError(
                f"row {row} begins or ends in token {token}, which is a word of the vocabulary and, for lack "
                f"of another, the padding token: which of the two it is can't be told{_GIVE_A_MASK}"
            )
    return (~padding).to(torch.long)


def _without_bos(ids: Tensor, on_left: Bool[Tensor, "batch pos"], bos: int | None) -> Tensor:
    """Padding on the left, without the beginning-of-sequence token if that is the same token."""
    is_bos = on_left & (ids == bos) if bos is not None else torch.zeros_like(on_left)
    counts = is_bos.sum(-1)
    if (shortest := int(counts.min())) == 0:
        return on_left
    if shortest > 1:
        raise ValueError(
            f"every row begins in {shortest} or more tokens {bos}, the beginning of a sequence and padding: "
            f"which of the two each is can't be told{_GIVE_A_MASK}"
        )
    places = torch.arange(ids.shape[1], device=ids.device)
    return on_left & (places != counts[:, None] - 1)


def _without_eos(ids: Tensor, on_right: Bool[Tensor, "batch pos"], eos: int | None) -> Tensor:
    """Padding on the right; no padding where every row ends in one end-of-sequence token, the same token."""
    is_eos = on_right & (ids == eos) if eos is not None else torch.zeros_like(on_right)
    counts = is_eos.sum(-1)
    if bool((counts == 1).all()):
        return on_right & ~is_eos
    if (row := _first(counts > 0)) is not None:
        raise ValueError(
            f"row {row} ends in {int(counts[row])} of token {eos}, the end of a sequence and padding: which "
            f"of the two each is can't be told{_GIVE_A_MASK}"
        )
    return on_right


def _main_eos(cfg: VLMConfig, tokenizer: Any) -> int | None:
    """The token that ends a text; generation may end at others too."""
    if tokenizer is not None:
        return tokenizer.eos_token_id
    return cfg.eos_token_ids[0] if cfg.eos_token_ids else None


def _is_special(cfg: VLMConfig, tokenizer: Any, token: int) -> bool:
    """Whether no text is tokenized to this token."""
    if tokenizer is None:
        return token != 0 or bool(cfg.eos_token_ids)  # 0 stands in where a config names neither
    added = tokenizer.added_tokens_decoder.get(token)
    specials: Sequence[int] = tokenizer.all_special_ids
    return token in specials or (added is not None and added.special)


def _first(rows: Bool[Tensor, " batch"]) -> int | None:
    """Index of the first row that is True; None if none is."""
    found: list[int] = to_list(rows.nonzero()[:, 0])
    return found[0] if found else None
