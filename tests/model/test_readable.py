"""Tokens as text: decoded, white space visible, never None, and no two alike."""

from __future__ import annotations

import re
import unicodedata

import pytest
from helpers import real_tokenizers

from hones_lens import HookedVLM
from hones_lens.model.readable import readable
from hones_lens.model.tokens import token_names

FAMILIES = pytest.mark.parametrize("family", sorted(real_tokenizers.PACKAGES))


def as_text(name: str) -> str:
    """The text of a name whose characters all print."""
    return name.replace("▁", " ").replace("↵", "\n").replace("⇥", "\t")


@pytest.mark.exhaustive
@pytest.mark.network
@FAMILIES
def test_no_two_tokens_of_a_vocabulary_look_alike(family: str) -> None:
    tokenizer = real_tokenizers.tokenizer(family)
    names = readable(tokenizer, range(len(tokenizer)))
    assert all(names) and not any(re.search(r"\s", name) for name in names)
    shown = {unicodedata.normalize("NFC", name) for name in names}
    assert len(shown) == len(names) == len(tokenizer)


@pytest.mark.exhaustive
@pytest.mark.network
@FAMILIES
def test_names_are_what_the_tokenizer_decodes_behind_a_letter(family: str) -> None:
    tokenizer = real_tokenizers.tokenizer(family)
    anchor = tokenizer("x", add_special_tokens=False).input_ids[-1:]
    before, n = tokenizer.decode(anchor), 0
    for token in range(260, len(tokenizer), 23):
        text = tokenizer.decode([*anchor, token]).removeprefix(before)
        (name,) = readable(tokenizer, [token])
        if "<" not in name and text and "\ufffd" not in text:
            assert as_text(name) == text, token
            n += 1
    assert n > 1000


@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "text", "names"),
    [
        ("qwen", "红色", ["红色"]),
        ("qwen", "a red\n\tcircle", ["a", "▁red", "↵", "⇥c", "ircle"]),
        ("llama", "it's 7 ½", ["▁it", "'", "s", "▁", "7", "▁", "½"]),
        ("llama", "東京", ["▁", "東", "京"]),
        ("llama3", " naïve", ["▁naï", "ve"]),
    ],
)
def test_words_and_signs(family: str, text: str, names: list[str]) -> None:
    tokenizer = real_tokenizers.tokenizer(family)
    assert readable(tokenizer, tokenizer(text, add_special_tokens=False).input_ids) == names


@pytest.mark.network
@FAMILIES
def test_parts_of_a_character_are_its_bytes(family: str) -> None:
    tokenizer = real_tokenizers.tokenizer(family)
    ids = tokenizer("鱻", add_special_tokens=False).input_ids
    names = "".join(readable(tokenizer, ids)).removeprefix("▁")
    found = re.findall("<0x(..)>", names)
    assert bytes.fromhex("".join(found)).decode() == "鱻" and len(names) == 6 * len(found)


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_rows_without_a_token_have_a_name_too(name: str) -> None:
    model = HookedVLM.from_pretrained(name)
    beyond = len(model.tokenizer) + 7
    assert model.to_str_tokens([beyond]) == token_names(model, [beyond]) == [f"[{beyond}]"]
    names = model.to_str_tokens("a red circle", prepend_bos=False)
    assert [name.strip("▁") for name in names] == ["a", "red", "circle"] and names[1] == "▁red"


def test_bytes_of_the_small_qwen() -> None:
    model = HookedVLM.from_pretrained("tiny-qwen2.5-vl")
    assert model.to_str_tokens("红 ▁", prepend_bos=False) == [
        *("<0xE7>", "<0xBA>", "<0xA2>", "▁"),
        *("<0xE2>", "<0x96>", "<0x81>"),
    ]


class Vocabulary:
    """A tokenizer of some pieces, which may be written in the table of bytes."""

    unk_token_id = None

    def __init__(self, *pieces: str, added: str = "", in_bytes: bool = False):
        self.pieces, self.added = [*pieces, *([added] if added else [])], added
        if in_bytes:
            self.byte_decoder = {}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        return [self.pieces[i] if i < len(self.pieces) else None for i in ids]

    def convert_tokens_to_ids(self, piece: str) -> int | None:
        return self.pieces.index(piece) if piece in self.pieces else None

    def get_added_vocab(self) -> dict[str, int]:
        return {self.added: self.pieces.index(self.added)} if self.added else {}

    def names(self) -> list[str]:
        return readable(self, range(len(self.pieces) + 1))


@pytest.mark.parametrize(
    ("vocabulary", "names"),
    [
        (Vocabulary("a", ""), ["a", "[1]", "[2]"]),
        (Vocabulary("▁a", added="▁b"), ["▁a", "<U+2581>b", "[2]"]),  # an added token's letters are meant
        (Vocabulary("q\u0307", "e\u0301", "\u00e9"), ["q\u0307", "e<U+0301>", "\u00e9", "[3]"]),
        (Vocabulary("<0x0A>", "<0x09>", "<0x41>"), ["↵", "⇥", "<0x41>", "[3]"]),
        (Vocabulary("<0x0A>", "\n"), ["<0x0A>", "↵", "[2]"]),
        (Vocabulary("Ġred", "çº¢", "çº", in_bytes=True), ["▁red", "红", "<0xE7><0xBA>", "[3]"]),
        (Vocabulary("红", "Ċ", in_bytes=True), ["红", "↵", "[2]"]),  # no letter of the table: as it is
    ],
)
def test_pieces_that_few_vocabularies_have(vocabulary: Vocabulary, names: list[str]) -> None:
    assert vocabulary.names() == names
