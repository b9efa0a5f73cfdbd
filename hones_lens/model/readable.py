"""Tokens as text that can be read: bytes decoded, white space visible, and no two tokens alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

# As SentencePiece writes a space; the signs themselves, as letters of a token, are written by code point.
_SIGNS = {" ": "▁", "\n": "↵", "\t": "⇥"}
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def readable(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as it reads in text, for results, tables and figures.

    A space is `▁`, a line break `↵`, a tab `⇥`; other white space, characters that don't print and those that
    look like others are `<U+00A0>`, bytes that are no whole character `<0xE7>`, and ids that no token has
    `[151700]`. Byte-level vocabularies (Qwen, Llama 3) are decoded, so that `çº¢èī²` is `红色`.

    Args:
        tokenizer: Hugging Face's tokenizer.
        ids: Token ids; rows of W_U behind the vocabulary are allowed.
    """
    pieces: list[str | None] = tokenizer.convert_ids_to_tokens(list(ids))
    added, in_bytes = set(tokenizer.get_added_vocab().values()), _is_byte_level(tokenizer)
    names = list[str]()
    for token_id, piece in zip(ids, pieces, strict=True):
        if not piece:
            names.append(f"[{token_id}]")
        elif token_id in added:
            names.append(_visible(piece))
        else:
            names.append(_visible(_decoded(piece) if in_bytes else _without_markers(tokenizer, piece)))
    return names


def _visible(text: str) -> str:
    """Text in which every character shows and looks like no other; lone surrogates stand for bytes."""
    out, is_normal = list[str](), unicodedata.is_normalized("NFC", text)
    for character in text:
        code = ord(character)
        if character in _SIGNS:
            out.append(_SIGNS[character])
        elif 0xDC80 <= code <= 0xDCFF:
            out.append(f"<0x{code - 0xDC00:02X}>")
        elif (
            character in _SIGNS.values()
            or not character.isprintable()
            or (not is_normal and _looks_like_another(character))
        ):
            out.append(f"<U+{code:04X}>")
        else:
            out.append(character)
    return "".join(out)


def _looks_like_another(character: str) -> bool:
    """Whether a character is shown as another one is (the Kelvin sign), or as one with that before it."""
    return unicodedata.combining(character) > 0 or not unicodedata.is_normalized("NFC", character)


def _without_markers(tokenizer: Any, piece: str) -> str:
    """A SentencePiece piece as text; a byte's piece too where it is the vocabulary's only white space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte is not None and (text := chr(int(byte[1], 16))) in "\n\t":
        known = tokenizer.convert_tokens_to_ids(text)
        return text if known is None or known == tokenizer.unk_token_id else piece
    return piece.replace("▁", " ")


def _decoded(piece: str) -> str:
    """A byte-level piece as text, in which bytes that are no whole character are lone surrogates."""
    try:
        data = bytes(_byte_of()[letter] for letter in piece)
    except KeyError:
        return piece
    return data.decode("utf-8", errors="surrogateescape")


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether a vocabulary's pieces are written in GPT-2's table of bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return hasattr(tokenizer, "byte_decoder")
    return b'"ByteLevel"' in backend.decoder.__getstate__()
