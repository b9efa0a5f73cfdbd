"""From pictures and prompts to token ids: chat format, image tokens, answers, left padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image
from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import Region, VLMInputs
from hones_lens.model.tokens import image_token_of, pad_left, tokenizer_of

_PROMPT_MARKER = "words of the user"
Picture = Image.Image | str | Path
Pictures = Picture | Sequence[Picture] | None


class ReadsPrompts(Protocol):
    """The part of a model that preparing prompts needs."""

    answer_separator: str
    default_chat_template: str
    processor: Any

    @property
    def cfg(self) -> VLMConfig:
        """Context length and padding id."""
        ...

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """Pixel inputs of the vision tower for these pictures, and the number of image tokens of each."""
        ...

    def shown_region(self, width: int, height: int) -> Region:
        """The part of a picture that reaches the vision tower."""
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


def pair_images_with_prompts(
    images: Pictures | Sequence[Pictures], prompts: str | Sequence[str]
) -> list[tuple[list[Image.Image], str]]:
    """Pair every prompt with its list of pictures.

    A single prompt takes a picture or a list of pictures; several prompts take one entry each: a
    picture, a list of pictures, or None for text alone.

    Raises:
        ValueError: Lengths that differ, no prompt, or an empty prompt.
    """
    if isinstance(prompts, str):
        prompts, images = [prompts], [cast("Pictures", images)]
    if images is None:
        images = [None] * len(prompts)
    if isinstance(images, (str, Path, Image.Image)) and len(prompts) == 1:
        images = [images]
    if isinstance(images, (str, Path, Image.Image)) or len(images) != len(prompts):
        n_entries = 1 if isinstance(images, (str, Path, Image.Image)) else len(images)
        raise ValueError(f"{n_entries} entries of images for {len(prompts)} prompts; give one entry a prompt")
    if not prompts:
        raise ValueError("no prompts")
    rows: list[tuple[list[Image.Image], str]] = []
    for i, (entry, prompt) in enumerate(zip(images, prompts, strict=True)):
        if not prompt.strip():
            raise ValueError(f"prompt {i} is empty")
        pictures = [entry] if isinstance(entry, (str, Path, Image.Image)) else list(entry or [])
        rows.append(([open_image(picture) for picture in pictures], prompt))
    return rows


def prepare(
    model: ReadsPrompts,
    images: Pictures | Sequence[Pictures],
    prompts: str | Sequence[str],
    answers: str | Sequence[str] | None = None,
) -> VLMInputs:
    """Pictures and prompts to a left-padded batch in the model's chat format (`HookedVLM.prepare`).

    Args:
        model: The model.
        images: For each prompt a picture (PIL image or path), a list of them, or None.
        prompts: The user's turns; one string or a list.
        answers: The assistant's turns, one per prompt: the inputs then hold prompt and answer,
            with `answer_mask` at the answer's tokens (no end-of-sequence token is added).

    Raises:
        FileNotFoundError, ValueError: A missing or unreadable image, an empty prompt or answer,
            lengths that differ, a prompt longer than the context.
    """
    rows = pair_images_with_prompts(images, prompts)
    answer_texts = [answers] if isinstance(answers, str) else answers
    if answer_texts is not None and len(answer_texts) != len(rows):
        raise ValueError(f"{len(answer_texts)} answers for {len(rows)} prompts")
    pixels, counts = model.process_images([image for pictures, _ in rows for image in pictures])
    texts: list[tuple[str, str]] = []
    n_images = 0
    for pictures, prompt in rows:
        image_tokens = counts[n_images : n_images + len(pictures)]
        n_images += len(pictures)
        texts.append((render(model, prompt, image_tokens), prompt))

    def answer_ids(text: str, row: int) -> list[int]:
        assert answer_texts is not None
        return continuation(tokenizer_of(model), text, model.answer_separator, answer_texts[row])

    encoded = tokenize_rows(
        tokenizer_of(model),
        texts,
        render(model, _PROMPT_MARKER, []).rpartition(_PROMPT_MARKER)[2],
        model.cfg.n_ctx,
        model.cfg.pad_token_id,
        None if answer_texts is None else answer_ids,
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


def render(model: ReadsPrompts, prompt: str, image_tokens: Sequence[int]) -> str:
    """The text that is tokenized: chat format applied, each image token repeated."""
    template = getattr(model.processor, "chat_template", None) or tokenizer_of(model).chat_template
    text = render_chat(
        tokenizer_of(model), template or model.default_chat_template, prompt, len(image_tokens)
    )
    return expand_images(text, image_token_of(model), image_tokens)


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
    segments = text.split(image_token)
    if len(segments) - 1 != len(counts):
        raise ValueError(
            f"{len(segments) - 1} image tokens {image_token!r} in the prompt for {len(counts)} images"
        )
    expanded = [segment + image_token * n for segment, n in zip(segments, counts, strict=False)]
    return "".join(expanded) + segments[-1]


def continuation(tokenizer: Any, text: str, separator: str, answer: str) -> list[int]:
    """The ids of an answer as it is tokenized after a prompt.

    Raises:
        ValueError: An empty answer, or one whose first letters the tokenizer joins to the prompt.
    """
    if not answer.strip():
        raise ValueError("the answer is empty")
    prompt_ids = tokenizer(text).input_ids
    all_ids = tokenizer(text + separator + answer).input_ids
    if all_ids[: len(prompt_ids)] != prompt_ids or len(all_ids) == len(prompt_ids):
        raise ValueError(f"the tokenizer joins the answer {answer!r} to the end of its prompt")
    return all_ids[len(prompt_ids) :]


def tokenize_rows(
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    suffix: str,
    n_ctx: int,
    pad_token_id: int,
    answer_ids: Callable[[str, int], list[int]] | None,
) -> TokenizedRows:
    """Tokenize rendered prompts (rendered text, the user's prompt within it) and pad them on the left.

    `suffix` is the text that the chat format puts after the user's prompt; the prompt is not searched there.

    Raises:
        ValueError: A row longer than the context, or a template that changes the user's words.
    """
    ids: list[list[int]] = []
    questions: list[list[bool]] = []
    answers: list[list[bool]] = []
    for i, (text, prompt) in enumerate(rows):
        encoded = tokenizer(text, return_offsets_mapping=True)
        start = text.rfind(prompt.strip(), 0, len(text) - len(suffix))
        if start < 0:
            raise ValueError(f"the chat template changes the words of prompt {i}, so they can't be marked")
        end = start + len(prompt.strip())
        answer_tokens = answer_ids(text, i) if answer_ids else []
        in_prompt = [a < end and b > start for a, b in encoded["offset_mapping"]]
        ids.append(encoded["input_ids"] + answer_tokens)
        questions.append(in_prompt + [False] * len(answer_tokens))
        answers.append([False] * len(in_prompt) + [True] * len(answer_tokens))
        if len(ids[-1]) > n_ctx:
            raise ValueError(f"prompt {i} has {len(ids[-1])} tokens, more than the context of {n_ctx}")
    return TokenizedRows(
        input_ids=pad_left(ids, pad_token_id),
        attention_mask=pad_left([[1] * len(row) for row in ids], 0),
        question=pad_left(questions, False),
        answer=pad_left(answers, False) if answer_ids else None,
    )
