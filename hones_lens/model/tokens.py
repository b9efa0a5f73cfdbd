"""Text to ids and back, under TransformerLens's names. `HookedVLM` has these functions as methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.iterables import takes_iterables
from hones_lens.model.readable import readable
from hones_lens.model.typed import to_list


class HasProcessor(Protocol):
    """The part of a model that tokenizing needs; `processor` is None if none was given."""

    processor: Any

    @property
    def cfg(self) -> VLMConfig:
        """Padding and image token ids, device."""
        ...


def tokenizer_of(model: HasProcessor) -> Any:
    """The processor's tokenizer.

    Raises:
        ValueError: The model was made without a processor.
    """
    return _processor_of(model).tokenizer


def image_processor_of(model: HasProcessor) -> Any:
    """The processor's image processor.

    Raises:
        ValueError: The model was made without a processor.
    """
    return _processor_of(model).image_processor


def _processor_of(model: HasProcessor) -> Any:
    if model.processor is None:
        raise ValueError("this model has no processor: pass one to HookedVLM.from_hf(hf_model, processor)")
    return model.processor


def image_token_of(model: HasProcessor) -> str:
    """The token that stands for one image token in text.

    Raises:
        ValueError: The tokenizer has no such token at the config's `image_token_id`.
    """
    token = find_image_token(model)
    if token is not None:
        return token
    tokenizer, token_id = tokenizer_of(model), model.cfg.image_token_id
    found = tokenizer.convert_ids_to_tokens(token_id)
    declared = _declared_image_token(model)
    of_its_own = "" if declared is None else f", and calls {declared!r} its image token"
    raise ValueError(
        f"the tokenizer does not have the model's image token: at image_token_id={token_id} it has {found!r}"
        f"{of_its_own}; load the processor that belongs to the checkpoint"
    )


def find_image_token(model: HasProcessor) -> str | None:
    """The token that stands for one image token in text; None if the tokenizer has none at the config's id.

    It has to be an added token, which no text is split across, and the one that tokenizer or processor name.
    """
    tokenizer = tokenizer_of(model)
    token = tokenizer.convert_ids_to_tokens(model.cfg.image_token_id)
    if token not in tokenizer.get_added_vocab() or _declared_image_token(model) not in (None, token):
        return None
    return token


def _declared_image_token(model: HasProcessor) -> str | None:
    """What the tokenizer, or else the processor, names as its image token."""
    named = getattr(tokenizer_of(model), "image_token", None)
    return named or getattr(model.processor, "image_token", None)


def text_ids(tokenizer: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """Ids of one text.

    Args:
        tokenizer: Hugging Face's tokenizer.
        text: The text; it may begin with the BOS token written out, as many chat templates do.
        prepend_bos: None for Hugging Face's rule, that of `processor.apply_chat_template(tokenize=True)`: the
            tokenizer's own special tokens, unless the text begins with BOS. True for one BOS in front
            whatever the tokenizer does by itself, False for no special tokens besides those in the text.

    Raises:
        ValueError: `prepend_bos=True` for a tokenizer without a BOS token.
    """
    return _encode_text(tokenizer, text, prepend_bos, return_offsets_mapping=False)["input_ids"]


def text_ids_and_spans(
    tokenizer: Any, text: str, prepend_bos: bool | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """As `text_ids`, and the characters of each token, from start up to end; (0, 0) for a BOS in front."""
    encoded = _encode_text(tokenizer, text, prepend_bos, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


def _encode_text(tokenizer: Any, text: str, prepend_bos: bool | None, **options: bool) -> dict[str, Any]:
    bos = tokenizer.bos_token
    if prepend_bos and bos is None:
        raise ValueError("prepend_bos=True, but this tokenizer has no BOS token")
    written_out = bos is not None and text.startswith(bos)
    encoded = dict(
        tokenizer(text, add_special_tokens=prepend_bos is not False and not written_out, **options)
    )
    if prepend_bos and encoded["input_ids"][:1] != [tokenizer.bos_token_id]:
        encoded["input_ids"] = [tokenizer.bos_token_id, *encoded["input_ids"]]
        encoded["offset_mapping"] = [(0, 0), *encoded.get("offset_mapping", [])]
    return encoded


def encode(
    model: HasProcessor, text: str | Sequence[str], prepend_bos: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Ids of plain text and their attention mask, [batch pos] each, padded on the left.

    Raises:
        TypeError: A list of anything else than strings, such as ids.
        ValueError: No text, or `prepend_bos=True` for a tokenizer without a BOS token.
    """
    texts: list[Any] = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("no text")
    if not all(isinstance(t, str) for t in texts):
        raise TypeError("give text, or ids as a tensor [batch pos]: torch.tensor(ids)")
    ids = [text_ids(tokenizer_of(model), t, prepend_bos) for t in texts]
    device = model.cfg.device
    mask = pad_left([[1] * len(row) for row in ids], 0)
    return pad_left(ids, model.cfg.pad_token_id).to(device), mask.to(device)


def pad_left(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length as one tensor, [batch pos], filled with `value` on the left."""
    length = max(map(len, rows))
    return torch.tensor([[value] * (length - len(row)) + list(row) for row in rows])


@takes_iterables
def to_tokens(model: HasProcessor, text: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor:
    """Ids of plain text [batch pos], without chat format; several texts are left-padded.

    Args:
        model: The model.
        text: One text or several. One that begins with the BOS token written out gets no second one.
        prepend_bos: Whether a BOS token stands in front; by default as the tokenizer does it.

    Raises:
        ValueError: No text, or `prepend_bos=True` for a tokenizer without a BOS token.
    """
    return encode(model, text, prepend_bos)[0]


def to_single_token(model: HasProcessor, text: str) -> int:
    """The id of text that is one token.

    The bare `▁` that SentencePiece vocabularies put before text is left out: "7" is the token `7`.

    Raises:
        ValueError: The text is not one token.
    """
    ids = bare_text_ids(model, text)
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens: {token_names(model, ids)}")
    return ids[0]


def bare_text_ids(model: HasProcessor, text: str) -> list[int]:
    """Ids of text alone, without special tokens and without the bare `▁` that a tokenizer puts before it."""
    ids: list[int] = tokenizer_of(model)(text, add_special_tokens=False).input_ids
    is_prefix = len(ids) > 1 and tokenizer_of(model).convert_ids_to_tokens(ids[0]) == "▁"
    return ids[1:] if is_prefix and not text[:1].isspace() else ids


def leading_blanks(model: HasProcessor, ids: Sequence[int]) -> int:
    """How many tokens an answer begins with that are white space alone and don't tell it from another.

    In LLaMA's vocabulary digits, CJK characters and many signs are tokens without a space, so that "7" behind
    a prompt is `▁`, `7`. An answer that is white space alone has none.
    """
    decode = tokenizer_of(model).decode
    return next((n for n in range(len(ids)) if decode(list(ids[: n + 1])).strip()), 0)


@takes_iterables
def to_str_tokens(
    model: HasProcessor, tokens: str | Tensor | Sequence[int], prepend_bos: bool | None = None
) -> list[str]:
    """Each token of one text, or of one row of ids, as it reads in text, a space as `▁` (see `readable`).

    `prepend_bos` as in `to_tokens`.
    """
    if isinstance(tokens, str):
        tokens = to_tokens(model, tokens, prepend_bos)
    return readable(tokenizer_of(model), to_list(torch.as_tensor(tokens).flatten()))


def to_string(model: HasProcessor, tokens: Tensor) -> str | list[str]:
    """Decode ids [pos] to a string, or [batch pos] to a list of strings."""
    return (
        tokenizer_of(model).decode(tokens) if tokens.ndim == 1 else tokenizer_of(model).batch_decode(tokens)
    )


def token_names(model: HasProcessor, ids: Sequence[int]) -> list[str]:
    """Tokens as they read in text, white space visible; `[id]` for rows of W_U that no token has."""
    return readable(tokenizer_of(model), ids)
