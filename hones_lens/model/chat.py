"""A checkpoint's chat format: the user's turn as its template writes it, and what stands before an answer."""

from __future__ import annotations

import re
import warnings
from typing import Any, Protocol

from jinja2 import TemplateError

from hones_lens.model.tokens import HasProcessor, find_image_token, image_token_of, tokenizer_of

_TEMPLATE = "the chat template "
_PROMPT, _ANSWER = "words of the user", "words of the assistant"
# What Jinja raises, and what the Python that a template calls does.
_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)
_PRINTED_LIST = re.compile(rf"""['"]text['"]\s*:\s*['"](?:{_PROMPT}|{_ANSWER})""")


class HasChatFormat(HasProcessor, Protocol):
    """The part of a model that its chat format is read from; see `Family`."""

    answer_separator: str
    default_chat_template: str
    image_markup: str

    def image_placeholder(self) -> str | None:
        """The token that chat templates write for an image, where it is not the image token."""
        ...


def placeholder_of(model: HasChatFormat) -> str:
    """The token that stands for an image in the model's chat template.

    Raises:
        ValueError: The tokenizer has no such token, or not the image token.
    """
    image_token = image_token_of(model)
    return model.image_placeholder() or image_token


class ChatFormat:
    """A model's chat template, filled in.

    The template is the processor's, else the tokenizer's, else the family's default. Templates that read a
    message's content as a list of parts get one. Templates that read a string, as those of language models
    do, get the images written before the prompt, with a warning.

    Attributes:
        prefix, suffix: What stands before and after the prompt of a turn without images.

    Raises:
        ValueError: A template that can't be filled in, or several of which none is named `default`.
    """

    def __init__(self, model: HasChatFormat):
        self._model = model
        self._tokenizer = tokenizer_of(model)
        self._template = chat_template_of(model)
        image_token = find_image_token(model)
        written = None if image_token is None else placeholder_of(model)
        self._image_markup = "" if written is None else model.image_markup.format(image=written)
        added = self._tokenizer.get_added_vocab()
        self._markers = [token for token in added if token in self._image_markup or token == image_token]
        self._reads_parts: dict[bool, bool] = {}
        turn = self._render([self._message("user", _PROMPT, 0, self._chosen_form(with_image=False))])
        self.prefix, _, self.suffix = turn.rpartition(_PROMPT)

    def user_turn(self, prompt: str, n_images: int) -> str:
        """One turn with its images before the prompt, opened for the assistant's answer.

        Raises:
            ValueError: A prompt that holds image tokens or the chat format itself, a template that has no
                place for images, or a tokenizer without the image token.
        """
        self._refuse_raw(prompt)
        if n_images:
            placeholder_of(self._model)
        as_parts = self._chosen_form(n_images > 0)
        if n_images and not as_parts:
            warnings.warn(
                "the chat template takes only text as a message's content: each image is written as "
                f"{self._image_markup!r} before the prompt",
                stacklevel=2,
            )
        return self._render([self._message("user", prompt, n_images, as_parts)])

    def before_answer(self) -> str:
        """The white space between an opened turn and the answer, as the template writes an assistant's turn.

        The family's `answer_separator` where the template does not write that turn after the opened one.
        """
        opened = self.prefix + _PROMPT + self.suffix
        for as_parts in (True, False):
            messages = [
                self._message("user", _PROMPT, 0, self._chosen_form(False)),
                self._message("assistant", _ANSWER, 0, as_parts),
            ]
            try:
                text = self._render(messages, opened_for_answer=False)
            except ValueError:
                continue
            separator, found, _ = text.removeprefix(opened).partition(_ANSWER)
            if text.startswith(opened) and found and not separator.strip():
                return separator
        return self._model.answer_separator

    def _refuse_raw(self, prompt: str) -> None:
        held = [marker for marker in self._markers if marker in prompt]
        start, end = self.prefix.strip(), self.suffix.strip()
        if start and end and prompt.strip().startswith(start) and prompt.strip().endswith(end):
            held += [start, end]
        if held:
            raise ValueError(
                f"the prompt {prompt[:60]!r} already holds {' and '.join(map(repr, held))}: prepare adds the "
                "chat format and the image tokens, so give it the user's words alone; a text that is in chat "
                "format already goes to the model as the mapping that Hugging Face's processor makes of it"
            )

    def _message(self, role: str, words: str, n_images: int, as_parts: bool) -> dict[str, Any]:
        content: Any = self._image_markup * n_images + words
        if as_parts:
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": words}]
        return {"role": role, "content": content}

    def _render(self, messages: list[dict[str, Any]], opened_for_answer: bool = True) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                add_generation_prompt=opened_for_answer,
                tokenize=False,
            )
        except _TEMPLATE_ERRORS as error:
            raise ValueError(f"{_TEMPLATE}raises {type(error).__name__} ({error})") from error

    def _chosen_form(self, with_image: bool) -> bool:
        """Whether content is given as a list of parts, the first of the two forms that the template reads."""
        if with_image not in self._reads_parts:
            faults = [self._fault(with_image, as_parts) for as_parts in (True, False)]
            if all(faults):
                raise ValueError(
                    f"the chat template can't take {'pictures' if with_image else 'a prompt'}: given a list "
                    f"of parts it {faults[0]}, given a string it {faults[1]}; set "
                    "model.processor.chat_template to one that can"
                )
            self._reads_parts[with_image] = faults[0] is None
        return self._reads_parts[with_image]

    def _fault(self, with_image: bool, as_parts: bool) -> str | None:
        """What the template does wrong with a turn in this form; None if it writes words and image."""
        try:
            text = self._render([self._message("user", _PROMPT, int(with_image), as_parts)])
        except ValueError as error:
            return str(error).removeprefix(_TEMPLATE)
        if _PRINTED_LIST.search(text):
            return "prints the list"
        if _PROMPT not in text:
            return "leaves out the prompt"
        if with_image and (n := text.count(placeholder_of(self._model))) != 1:
            return f"writes {n} image tokens for one image"
        return None


def chat_template_of(model: HasChatFormat) -> str:
    """The Jinja template of the processor, else of the tokenizer, else the family's default.

    Raises:
        ValueError: Several templates, none of them named `default`.
    """
    found = getattr(model.processor, "chat_template", None) or tokenizer_of(model).chat_template
    template: str | dict[str, str] = found or model.default_chat_template
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(f"none of the chat templates {', '.join(template)} is named 'default'")
    return template["default"]
