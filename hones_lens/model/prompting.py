"""From pictures and prompts to token ids: chat format, image tokens, answers, left padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from hones_lens.model.inputs import VLMInputs

if TYPE_CHECKING:
    from hones_lens.model.hooked_vlm import HookedVLM

_MARK = "words of the user"
Picture = Image.Image | str | Path
Pictures = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class TokenizedRows:
    """Left-padded token ids and masks, each [batch pos]; `answer` is None without answers."""

    input_ids: Tensor
    attention_mask: Tensor
    question: Tensor
    answer: Tensor | None


def open_image(picture: Picture) -> Image.Image:
    """The picture in RGB, read now.

    Raises:
        FileNotFoundError: No such file; names it.
        ValueError: Not an image, or a truncated one; names the file.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not Path(picture).is_file():
        raise FileNotFoundError(f"image {str(picture)!r} does not exist")
    try:
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"image {str(picture)!r} can't be read: {error}") from error


def rows_of(
    images: Pictures | Sequence[Pictures], prompts: str | Sequence[str]
) -> list[tuple[list[Image.Image], str]]:
    """Pair every prompt with its list of pictures.

    A single prompt takes a picture or a list of pictures; several prompts take one entry each: a
    picture, a list of them, or None for text alone.

    Raises:
        ValueError: Lengths that differ, no prompt, or an empty prompt.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
        images = [images]  # type: ignore[list-item]
    if images is None:
        images = [None] * len(prompts)
    if isinstance(images, (str, Path, Image.Image)) and len(prompts) == 1:
        images = [images]
    if isinstance(images, (str, Path, Image.Image)) or len(images) != len(prompts):
        given = 1 if isinstance(images, (str, Path, Image.Image)) else len(images)
        raise ValueError(f"{given} entries of images for {len(prompts)} prompts; give one entry a prompt")
    if not prompts:
        raise ValueError("no prompts")
    rows = []
    for i, (entry, prompt) in enumerate(zip(images, prompts, strict=True)):
        if not prompt.strip():
            raise ValueError(f"prompt {i} is empty")
        several = [entry] if isinstance(entry, (str, Path, Image.Image)) else list(entry or [])
        rows.append(([open_image(picture) for picture in several], prompt))
    return rows


def prepare(
    model: HookedVLM,
    images: Pictures | Sequence[Pictures],
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | None,
) -> VLMInputs:
    """See `HookedVLM.prepare`."""
    rows = rows_of(images, prompts)
    said = [answers] if isinstance(answers, str) else answers
    if said is not None and len(said) != len(rows):
        raise ValueError(f"{len(said)} answers for {len(rows)} prompts")
    pixels, counts = model.process_images([image for pictures, _ in rows for image in pictures])
    texts, taken = [], 0
    for pictures, prompt in rows:
        here = counts[taken : taken + len(pictures)]
        taken += len(pictures)
        texts.append((model.render(prompt, here), prompt))

    def answer_ids(text: str, row: int) -> list[int]:
        assert said is not None
        return continuation(model.tokenizer, text, model.answer_separator, said[row])

    encoded = tokenize_rows(
        model.tokenizer,
        texts,
        model.render(_MARK, []).rpartition(_MARK)[2],
        model.cfg.n_ctx,
        model.cfg.pad_token_id,
        None if said is None else answer_ids,
    )
    inputs = VLMInputs(
        input_ids=encoded.input_ids,
        attention_mask=encoded.attention_mask,
        question_mask=encoded.question,
        answer_mask=encoded.answer,
        regions=tuple(tuple(model.shown_region(*image.size) for image in pictures) for pictures, _ in rows),
        **pixels,
    )
    return model.as_inputs(inputs)


def render_chat(tokenizer: Any, template: str, prompt: str, n_images: int) -> str:
    """One user turn, opened for the assistant's answer, by a chat template."""
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert isinstance(text, str)
    return text


def expand_images(text: str, image_token: str, counts: Sequence[int]) -> str:
    """Repeat each image token as often as its image has tokens.

    Raises:
        ValueError: More or fewer image tokens than images; names both counts.
    """
    parts = text.split(image_token)
    if len(parts) - 1 != len(counts):
        raise ValueError(
            f"{len(parts) - 1} image tokens {image_token!r} in the prompt for {len(counts)} images"
        )
    grown = [part + image_token * n for part, n in zip(parts, counts, strict=False)]
    return "".join(grown) + parts[-1]


def continuation(tokenizer: Any, text: str, separator: str, answer: str) -> list[int]:
    """The ids that an answer has where it follows a prompt.

    Raises:
        ValueError: An empty answer, or one whose first letters the tokenizer joins to the prompt.
    """
    if not answer.strip():
        raise ValueError("the answer is empty")
    before = tokenizer(text).input_ids
    after = tokenizer(text + separator + answer).input_ids
    if after[: len(before)] != before or len(after) == len(before):
        raise ValueError(f"the tokenizer joins the answer {answer!r} to the end of its prompt")
    return after[len(before) :]


def tokenize_rows(
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    tail: str,
    n_ctx: int,
    pad_token_id: int,
    answer_ids: Callable[[str, int], list[int]] | None,
) -> TokenizedRows:
    """Tokenize rendered prompts (text, the user's own part of it) and pad them on the left.

    `tail` is what the chat format puts behind the user's words, so that they are not looked for there.

    Raises:
        ValueError: A row longer than the context, or a template that changes the user's words.
    """
    ids, questions, answers = [], [], []
    for i, (text, prompt) in enumerate(rows):
        encoded = tokenizer(text, return_offsets_mapping=True)
        start = text.rfind(prompt.strip(), 0, len(text) - len(tail))
        if start < 0:
            raise ValueError(f"the chat template changes the words of prompt {i}, so they can't be marked")
        end = start + len(prompt.strip())
        said = answer_ids(text, i) if answer_ids else []
        asked = [a < end and b > start for a, b in encoded["offset_mapping"]]
        ids.append(encoded["input_ids"] + said)
        questions.append(asked + [False] * len(said))
        answers.append([False] * len(asked) + [True] * len(said))
        if len(ids[-1]) > n_ctx:
            raise ValueError(f"prompt {i} has {len(ids[-1])} tokens, more than the context of {n_ctx}")
    length = max(map(len, ids))
    return TokenizedRows(
        input_ids=_pad(ids, length, pad_token_id),
        attention_mask=_pad([[1] * len(row) for row in ids], length, 0),
        question=_pad(questions, length, False),
        answer=_pad(answers, length, False) if answer_ids else None,
    )


def _pad(rows: Sequence[list], length: int, value: int) -> Tensor:
    return torch.tensor([[value] * (length - len(row)) + row for row in rows])
