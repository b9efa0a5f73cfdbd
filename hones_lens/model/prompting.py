"""From pictures and prompts to token ids: chat format, image tokens, answers, left padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from hones_lens.model.chat import ChatFormat, placeholder_of
from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import ImageText, Region, VLMInputs
from hones_lens.model.iterables import takes_iterables
from hones_lens.model.pictures import Pictures, listed, open_images
from hones_lens.model.tokens import image_token_of, pad_left, text_ids, text_ids_and_spans, tokenizer_of

MOST_IMAGE_TOKENS = 2000  # of a picture, above which `prepare` warns


class ReadsPrompts(Protocol):
    """The part of a model that preparing prompts needs."""

    answer_separator: str
    default_chat_template: str
    image_markup: str
    processor: Any
    processor_options: tuple[str, ...]
    whole_among_others: bool

    @property
    def cfg(self) -> VLMConfig:
        """Context length and padding id."""
        ...

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], Sequence[ImageText]]:
        """Pixel inputs of the vision tower for these pictures, and what stands for each in a prompt."""
        ...

    def image_placeholder(self) -> str | None:
        """The token that chat templates write for an image, where it is not the image token."""
        ...

    def process_pictures(
        self, images: Sequence[Image.Image], wholes: Sequence[bool]
    ) -> tuple[dict[str, Any], Sequence[ImageText]]:
        """The same, where some pictures are read as wholes."""
        ...

    def pixel_rows(self, pixels: Mapping[str, Tensor], texts: Sequence[ImageText]) -> list[int]:
        """How many rows of `pixel_values` each picture has."""
        ...

    def shown_regions(self, width: int, height: int) -> list[Region]:
        """The part of a picture that each of its grids covers."""
        ...

    def whole_region(self, width: int, height: int) -> Region:
        """The part of a picture that is read as a whole."""
        ...

    def as_inputs(self, model_input: VLMInputs) -> VLMInputs:
        """The inputs with their images located."""
        ...


@dataclass(frozen=True)
class TokenizedRows:
    """Left-padded token ids and masks, each [batch pos]; `answer` is None without answers."""

    input_ids: Tensor
    attention_mask: Tensor
    question: Tensor
    answer: Tensor | None


def pair_images_with_prompts(
    images: Pictures | Iterable[Pictures], prompts: str | Sequence[str]
) -> list[tuple[list[Image.Image], str]]:
    """Pair every prompt with its list of pictures.

    A single prompt takes a picture or a list of pictures; several prompts take one entry each: a
    picture, a list of pictures, or None for text alone.

    Raises:
        ValueError: Lengths that differ, no prompt, or an empty prompt.
        FileNotFoundError, ValueError, TypeError: A picture that `open_image` refuses.
    """
    entries: list[Any]
    if isinstance(prompts, str):
        prompts, entries = [prompts], [images]
    else:
        entries = [None] * len(prompts) if images is None else listed(images)
    if len(entries) != len(prompts):
        raise ValueError(
            f"{len(entries)} entries of images for {len(prompts)} prompts; give one entry a prompt"
        )
    if not prompts:
        raise ValueError("no prompts")
    rows: list[tuple[list[Image.Image], str]] = []
    opened: dict[int, list[Image.Image]] = {}  # one entry of several prompts is opened once
    for i, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
        if not prompt.strip():
            raise ValueError(f"prompt {i} is empty")
        if id(entry) not in opened:
            opened[id(entry)] = open_images(entry, f" of prompt {i}")
        rows.append((opened[id(entry)], prompt))
    return rows


def _processed(
    model: ReadsPrompts, rows: Sequence[Sequence[Image.Image]]
) -> tuple[dict[str, Any], list[ImageText]]:
    """As `process_images`, but that one picture at several places is processed once."""
    places = [(image, _is_whole(model, row)) for row in rows for image in row]
    distinct = {(id(image), whole): (image, whole) for image, whole in places}
    pixels, texts = model.process_pictures(
        [image for image, _ in distinct.values()], [whole for _, whole in distinct.values()]
    )
    groups = {}
    if model.whole_among_others and places:
        groups["batch_num_images"] = torch.tensor([len(row) for row in rows if row])
    if len(distinct) == len(places):
        return pixels | groups, list(texts)
    numbers = {key: number for number, key in enumerate(distinct)}
    index = [numbers[id(image), whole] for image, whole in places]
    parts = torch.split(pixels["pixel_values"], model.pixel_rows(pixels, texts))
    repeated = {name: of_pictures[index] for name, of_pictures in pixels.items() if name != "pixel_values"}
    repeated["pixel_values"] = torch.cat([parts[i] for i in index])
    return repeated | groups, [texts[i] for i in index]


def _is_whole(model: ReadsPrompts, row: Sequence[Image.Image]) -> bool:
    return model.whole_among_others and len(row) > 1


@takes_iterables
def prepare(
    model: ReadsPrompts,
    images: Pictures | Iterable[Pictures],
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | None = None,
    *,
    prepend_bos: bool | None = None,
) -> VLMInputs:
    """Pictures and prompts to a left-padded batch in the model's chat format (`HookedVLM.prepare`).

    Ids are those of Hugging Face's `processor.apply_chat_template(tokenize=True)`: one BOS token, whether the
    chat template writes it or the tokenizer adds it. A chat template that takes only text, as a language
    model's does, gets the images written before the prompt, with a warning.

    Args:
        model: The model.
        images: For each prompt a picture (PIL image, path or uint8 array, read as `model/pictures.py` says),
            a list of them, or None.
        prompts: The user's turns, without image tokens and chat format; one string or a list.
        answers: The assistant's turns, one per prompt: the inputs then hold prompt and answer,
            with `answer_mask` at the answer's tokens (no end-of-sequence token is added).
        prepend_bos: Whether each row begins with a BOS token; by default as Hugging Face's processor does it.

    Raises:
        FileNotFoundError, ValueError: A missing or unreadable image, an empty prompt or answer, a prompt
            that holds image tokens or the chat format itself, lengths that differ, a prompt longer than the
            context, a chat template that can't take pictures, a tokenizer without the image token, or
            `prepend_bos=True` without a BOS token.
        TypeError: Something that is no picture.
    """
    rows = pair_images_with_prompts(images, prompts)
    answer_texts = [answers] if isinstance(answers, str) else answers
    if answer_texts is not None and len(answer_texts) != len(rows):
        raise ValueError(f"{len(answer_texts)} answers for {len(rows)} prompts")
    pixels, image_texts = _processed(model, [pictures for pictures, _ in rows])
    _warn_of_large_pictures(model, image_texts)
    chat = ChatFormat(model)
    texts: list[tuple[str, str]] = []
    n_images = 0
    for pictures, prompt in rows:
        of_row = image_texts[n_images : n_images + len(pictures)]
        n_images += len(pictures)
        texts.append((_write_out(model, chat, prompt, of_row), prompt))
    ids_of_answers: list[list[int]] | None = None
    if answer_texts is not None:
        separator = chat.before_answer()
        ids_of_answers = [
            answer_ids(tokenizer_of(model), text, separator, answer)
            for (text, _), answer in zip(texts, answer_texts, strict=True)
        ]
    encoded = tokenize_rows(model, texts, chat.suffix, ids_of_answers, prepend_bos)
    inputs = VLMInputs(
        input_ids=encoded.input_ids,
        attention_mask=encoded.attention_mask,
        question_mask=encoded.question,
        answer_mask=encoded.answer,
        regions=_regions(model, [pictures for pictures, _ in rows]),
        **pixels,
    )
    return model.as_inputs(inputs)


def _regions(
    model: ReadsPrompts, pictures: Sequence[Sequence[Image.Image]]
) -> tuple[tuple[Region, ...], ...]:
    """Which part of its picture each grid shows, by row."""
    by_row = list[tuple[Region, ...]]()
    for row in pictures:
        whole = _is_whole(model, row)
        of_row = [
            [model.whole_region(*picture.size)] if whole else model.shown_regions(*picture.size)
            for picture in row
        ]
        by_row.append(tuple(region for regions in of_row for region in regions))
    return tuple(by_row)


def _warn_of_large_pictures(model: ReadsPrompts, texts: Sequence[ImageText]) -> None:
    counts = [text if isinstance(text, int) else text.count(image_token_of(model)) for text in texts]
    if counts and max(counts) > MOST_IMAGE_TOKENS:
        warnings.warn(
            f"a picture becomes {max(counts):,} tokens, more than {MOST_IMAGE_TOKENS:,}: "
            + (
                "max_pixels= of from_pretrained (--max-pixels) bounds it"
                if "max_pixels" in model.processor_options
                else "smaller pictures become fewer"
            ),
            stacklevel=4,
        )


@takes_iterables
def render(model: ReadsPrompts, prompt: str, image_tokens: Sequence[ImageText]) -> str:
    """The text that is tokenized: chat format applied, each image token repeated.

    Raises:
        ValueError: A prompt or a chat template that does not fit, see `ChatFormat.user_turn`.
    """
    return _write_out(model, ChatFormat(model), prompt, image_tokens)


@takes_iterables
def prompt_lengths(model: ReadsPrompts, image: Image.Image, prompts: Sequence[str]) -> list[int]:
    """How many tokens each of these prompts has with one picture, as `prepare` tokenizes them.

    The picture is processed once. Lengths are not compared with the context.

    Raises:
        ValueError: An empty prompt, or as `render`.
    """
    _, image_tokens = model.process_images([image])
    chat, lengths = ChatFormat(model), list[int]()
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("its prompt is empty")
        text = _write_out(model, chat, prompt, image_tokens)
        lengths.append(len(text_ids(tokenizer_of(model), text)))
    return lengths


def _write_out(model: ReadsPrompts, chat: ChatFormat, prompt: str, image_tokens: Sequence[ImageText]) -> str:
    text = chat.user_turn(prompt, len(image_tokens))
    if not image_tokens:
        return text
    return expand_images(text, image_token_of(model), image_tokens, placeholder_of(model))


def expand_images(text: str, image_token: str, texts: Sequence[ImageText], placeholder: str) -> str:
    """Write for each placeholder as many image tokens as its image has, or the text that stands for it.

    Raises:
        ValueError: More or fewer placeholders than images; names both counts.
    """
    segments = text.split(placeholder)
    if len(segments) - 1 != len(texts):
        raise ValueError(
            f"{len(segments) - 1} image tokens {placeholder!r} in the prompt for {len(texts)} images"
        )
    written = [image_token * text if isinstance(text, int) else text for text in texts]
    return "".join(a + b for a, b in zip(segments, [*written, ""], strict=True))


def continuation(model: ReadsPrompts, prompt: str, answer: str, n_images: int) -> list[int]:
    """The ids of an answer as it is tokenized after a prompt (`HookedVLM.continuation`).

    Raises:
        ValueError: As `render` and `answer_ids`.
    """
    chat = ChatFormat(model)
    text = _write_out(model, chat, prompt, [1] * n_images)
    return answer_ids(tokenizer_of(model), text, chat.before_answer(), answer)


def answer_ids(tokenizer: Any, text: str, separator: str, answer: str) -> list[int]:
    """The ids of an answer as it is tokenized after a rendered prompt and the white space between them.

    Raises:
        ValueError: An empty answer, or one whose first letters the tokenizer joins to the prompt.
    """
    if not answer.strip():
        raise ValueError("the answer is empty")
    prompt_ids = text_ids(tokenizer, text)
    all_ids = text_ids(tokenizer, text + separator + answer)
    if all_ids[: len(prompt_ids)] != prompt_ids or len(all_ids) == len(prompt_ids):
        raise ValueError(f"the tokenizer joins the answer {answer!r} to the end of its prompt")
    return all_ids[len(prompt_ids) :]


def tokenize_rows(
    model: ReadsPrompts,
    rows: Sequence[tuple[str, str]],
    suffix: str,
    answers: Sequence[Sequence[int]] | None,
    prepend_bos: bool | None = None,
) -> TokenizedRows:
    """Tokenize rendered prompts, append their answers, and pad them on the left.

    Args:
        model: The model: its tokenizer, context length and padding id.
        rows: For each row the rendered text, and the user's prompt within it.
        suffix: What the chat format puts after the user's prompt; the prompt is not searched there.
        answers: Ids of each row's answer.
        prepend_bos: As in `prepare`.

    Raises:
        ValueError: A row longer than the context, or a template that changes the user's words.
    """
    ids: list[list[int]] = []
    questions: list[list[bool]] = []
    answer_marks: list[list[bool]] = []
    for i, (text, prompt) in enumerate(rows):
        row_ids, spans = _prompt_ids(tokenizer_of(model), text, prepend_bos)
        start = text.rfind(prompt.strip(), 0, len(text) - len(suffix))
        if start < 0:
            raise ValueError(f"the chat template changes the words of prompt {i}, so they can't be marked")
        end = start + len(prompt.strip())
        answer = list(answers[i]) if answers else []
        ids.append(row_ids + answer)
        questions.append([a < end and b > start for a, b in spans] + [False] * len(answer))
        answer_marks.append([False] * len(row_ids) + [True] * len(answer))
        if len(ids[-1]) > model.cfg.n_ctx:
            raise ValueError(
                f"prompt {i} has {len(ids[-1])} tokens, more than the context of {model.cfg.n_ctx}"
            )
    return TokenizedRows(
        input_ids=pad_left(ids, model.cfg.pad_token_id),
        attention_mask=pad_left([[1] * len(row) for row in ids], 0),
        question=pad_left(questions, False),
        answer=pad_left(answer_marks, False) if answers else None,
    )


def _prompt_ids(
    tokenizer: Any, text: str, prepend_bos: bool | None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and characters of a rendered prompt; without BOS also where the chat template writes it."""
    ids, spans = text_ids_and_spans(tokenizer, text, prepend_bos)
    if prepend_bos is False and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        return ids[1:], spans[1:]
    return ids, spans
