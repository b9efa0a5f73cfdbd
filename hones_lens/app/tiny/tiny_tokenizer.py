"""The tokenizers of the shipped models: whole words of the shapes world, letters for all else.

Both are BPE tokenizers of their family's class whose merges are written down instead of learned:
every word of the world's prompts and answers is one token, and the words inside the blue box, which
no list could hold, are spelled letter by letter.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hones_lens.data import COLORS, NUMBER_WORDS, SHAPES, THING_NAMES

SPACE = "▁"
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
LLAVA_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}{% else %}"
    "{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)
QWEN_CHAT = (
    "{% for message in messages %}" + _QWEN_SYSTEM + "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ONEVISION_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
ONEVISION_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CHAT = QWEN_CHAT.replace(_QWEN_SYSTEM, "")
SMOLVLM_MARKERS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
SMOLVLM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *SMOLVLM_MARKERS)
SMOLVLM_CHAT = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA_SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LINE_STARTS = ("Question", "Answer", "Transcribe", "Output", "Candidate", "Describe", "Does")
_WORDS = """
a an and answer the question with short phrase text inside blue box only image in one sentence
candidate correctly describe exactly or Yes No what color shape is small large how many shapes are
there on left middle right at top center bottom called it of
"""


def _left_to_right(word: str) -> list[tuple[str, str]]:
    return [(word[:i], word[i]) for i in range(1, len(word))]


def _right_to_left(word: str) -> list[tuple[str, str]]:
    return [(word[i], word[i + 1 :]) for i in range(len(word) - 2, -1, -1)]


def _merges() -> list[tuple[str, str]]:
    """Merges in rank order; roles grow from their colon, so they never touch the boxed words."""
    words = [*_WORDS.split(), *COLORS, *SHAPES, *NUMBER_WORDS, *THING_NAMES.values()]
    merges = [pair for role in ("USER:", "ASSISTANT:") for pair in _right_to_left(role)]
    merges += [(SPACE, "USER:"), (SPACE, "ASSISTANT:")]
    merges += [pair for word in _LINE_STARTS for pair in _left_to_right(word)]
    merges += [(SPACE, letter) for letter in string.ascii_uppercase]
    merges += [pair for word in words for pair in _left_to_right(SPACE + word)]
    return list(dict.fromkeys(merges))


def _numbered(pieces: Iterable[str], special_ids: Mapping[str, int] | None) -> dict[str, int]:
    """Number pieces as they come; with ids of special tokens around these, and with fillers up to the last.

    Fillers are words that no merge makes: they give a vocabulary its true size.
    """
    if special_ids is None:
        return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    special = {i: piece for piece, i in special_ids.items()}
    others = (piece for piece in dict.fromkeys(pieces) if piece not in special_ids)
    ids = range(max(special) + 1)
    return {special[i] if i in special else next(others, f"filler{i}"): i for i in ids}


def build_llava_tokenizer(
    model_max_length: int, special_ids: Mapping[str, int] | None = None
) -> LlamaTokenizer:
    """Make tiny-llava's tokenizer (about 420 entries), with the chat template of LLaVA-1.5.

    Args:
        model_max_length: Longest text, in tokens.
        special_ids: Ids of all special tokens, if the vocabulary is to reach up to these.
    """
    merges = _merges()
    printable = string.ascii_letters + string.digits + string.punctuation + "\n" + SPACE
    pieces = [*SPECIAL, *printable, *(left + right for left, right in merges)]
    tokenizer = LlamaTokenizer(
        vocab=_numbered(pieces, special_ids),
        merges=merges,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = LLAVA_CHAT
    return tokenizer


def _byte_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token, bare and behind a space (`Ġ`), whatever came before it.

    A later merge never changes an earlier word, because BPE takes the merge of lowest rank first.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        for pieces in (list(word), ["Ġ", *word]):
            while len(pieces) > 1:
                pairs = list(itertools.pairwise(pieces))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                ranks.setdefault(best, len(ranks))
                position = pairs.index(best)
                pieces[position : position + 2] = ["".join(best)]
    return list(ranks)


def build_qwen_tokenizer(
    model_max_length: int, special_ids: Mapping[str, int] | None = None
) -> Qwen2Tokenizer:
    """Make tiny-qwen2.5-vl's byte-level tokenizer, with the chat template of Qwen2.5-VL.

    Args:
        model_max_length: Longest text, in tokens.
        special_ids: Ids of all special tokens, if the vocabulary is to reach up to these.
    """
    vocabulary = _bytes_and_words("system user assistant You are helpful", QWEN_SPECIAL, special_ids)
    tokenizer = Qwen2Tokenizer(
        **vocabulary,
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "im_start_token": "<|im_start|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def build_onevision_tokenizer(
    model_max_length: int, special_ids: Mapping[str, int] | None = None
) -> Qwen2Tokenizer:
    """Make a byte-level tokenizer with the image token and the chat template of LLaVA-OneVision.

    Args:
        model_max_length: Longest text, in tokens.
        special_ids: Ids of all special tokens, if the vocabulary is to reach up to these.
    """
    tokenizer = Qwen2Tokenizer(
        **_bytes_and_words("user assistant", ONEVISION_SPECIAL, special_ids),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens={
            "im_start_token": "<|im_start|>",
            "image_token": "<image>",
            "video_token": "<video>",
        },
        model_max_length=model_max_length,
    )
    tokenizer.chat_template = ONEVISION_CHAT
    return tokenizer


def build_smolvlm_tokenizer(
    model_max_length: int, special_ids: Mapping[str, int] | None = None
) -> Qwen2Tokenizer:
    """Make a byte-level tokenizer with the markers and the chat template of SmolVLM.

    Args:
        model_max_length: Longest text, in tokens.
        special_ids: Ids of all special tokens, if the vocabulary is to reach up to these.
    """
    tokenizer = Qwen2Tokenizer(
        **_bytes_and_words("User Assistant", SMOLVLM_SPECIAL, special_ids),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        eos_token="<end_of_utterance>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        model_max_length=model_max_length,
    )
    tokenizer.add_tokens(list(SMOLVLM_MARKERS), special_tokens=True)
    tokenizer.chat_template = SMOLVLM_CHAT
    return tokenizer


def build_gemma_tokenizer(
    model_max_length: int, special_ids: Mapping[str, int] | None = None
) -> GemmaTokenizer:
    """Make a tokenizer with the special tokens and the chat template of Gemma 3.

    Args:
        model_max_length: Longest text, in tokens.
        special_ids: Ids of all special tokens, if the vocabulary is to reach up to these.
    """
    merges: Any = _merges()
    printable = string.ascii_letters + string.digits + string.punctuation + "\n" + SPACE
    pieces = [*GEMMA_SPECIAL, *printable, *(left + right for left, right in merges)]
    tokenizer = GemmaTokenizer(
        vocab=_numbered(pieces, special_ids),
        merges=merges,
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "start_of_turn_token": "<start_of_turn>",
            "end_of_turn_token": "<end_of_turn>",
        },
        model_max_length=model_max_length,
        add_bos_token=True,
    )
    tokenizer.update_post_processor()
    tokenizer.chat_template = GEMMA_CHAT
    return tokenizer


def _bytes_and_words(
    of_chat: str, special: Iterable[str], special_ids: Mapping[str, int] | None
) -> dict[str, Any]:
    """Vocabulary and merges of a byte-level tokenizer that knows the world's words and those of the chat."""
    words = [*_LINE_STARTS, *_WORDS.split(), *of_chat.split()]
    words += [*COLORS, *SHAPES, *NUMBER_WORDS, *THING_NAMES.values()]
    merges: Any = _byte_merges(words)
    pieces = [*bytes_to_unicode().values(), *(left + right for left, right in merges), *special]
    return {"vocab": _numbered(pieces, special_ids), "merges": merges}
