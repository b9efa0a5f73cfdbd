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
