"""Prompts in the true vocabularies: ids are those of Hugging Face's tokenizer and chat template."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers import chat_templates, random_llava as llava, random_qwen as qwen, true_vocabularies
from PIL import Image

from hones_lens import HookedVLM
from hones_lens.model.qwen_like import QwenProcessor

pytestmark = [pytest.mark.network]

PROMPTS = (
    "What is shown?",
    "Question: what color is the circle?\nAnswer the question with a short phrase.",
    "Transcribe the text inside the blue box.\nOutput text only.",
    "Describe the image in one sentence.",
    "Candidate: a red circle left of a blue square\nDoes the candidate correctly describe the image?\n"
    "Answer exactly Yes or No.",
    "How many? 7 or 12?",
    "1 + 1 = 2",
    "Is this the dog's ball, or isn't it?",
    "“Curly” quotes – and a dash",
    "東京タワーはどこですか？",
    "这是什么颜色？红色还是蓝色？",
    "½ of the pie, 3 % of the rest",
    "naïve café, Straße, año",
    "emoji 🙂 in the middle",
    "  leading and trailing spaces  ",
    "tabs\tand\n\nblank lines",
    "UPPER lower MiXeD",
    "a",
    "x" * 60,
    "<b>markup</b> & entities &amp;",
    "what is the price? $5.00 (USD)",
)
ANSWERS = ("2", "7", "東京", "½", "Yes", "No", "it's red", "red circle", "1,234", "a")


@pytest.fixture(scope="module", autouse=True)
def free_the_models() -> Any:
    yield
    own_model.cache_clear()


@cache
def own_model(vocabulary: str) -> HookedVLM:
    """A model whose chat template these tests may change."""
    made = (
        true_vocabularies.fresh_qwen() if vocabulary == "qwen" else true_vocabularies.fresh_llava(vocabulary)
    )
    return made[1]


class Case:
    """A model with a true vocabulary and a chat template, beside Hugging Face's processor with the same two.

    `text` writes pictures and prompt as the one string that templates of language models read; None where
    the template reads a list of parts.
    """

    def __init__(self, vocabulary: str, template: Any, text: str | None = None):
        self.model = own_model(vocabulary)
        self.model.processor.chat_template = template
        self.text = text

    def conversation(self, prompt: str, pictures: list[Image.Image], answer: str | None = None) -> list[Any]:
        if self.text is None:
            parts = [{"type": "image", "image": picture} for picture in pictures]
            turns = [[*parts, {"type": "text", "text": prompt}], [{"type": "text", "text": answer}]]
        else:
            turns = [self.text * len(pictures) + prompt, answer]
        roles = ("user", "assistant") if answer is not None else ("user",)
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]

    def expected_ids(self, prompt: str, pictures: list[Image.Image], answer: str | None = None) -> list[int]:
        processor = self.model.processor
        if isinstance(processor, QwenProcessor):
            processor = qwen.hugging_faces_processor(processor)
        by_name = {"images": pictures} if self.text is not None and pictures else {}
        encoded = processor.apply_chat_template(
            self.conversation(prompt, pictures, answer),
            add_generation_prompt=answer is None,
            tokenize=True,
            return_dict=True,
            processor_kwargs=by_name,
        )
        return encoded["input_ids"][0]


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CASES: dict[str, Callable[[], Case]] = {
    "llava": lambda: Case("llama", chat_templates.LLAVA),
    "llava, with BOS": lambda: Case("llama", chat_templates.LLAVA_WITH_BOS),
    "llava, several": lambda: Case("llama", {"default": chat_templates.LLAVA_WITH_BOS, "tool_use": "no"}),
    "llava, text parts": lambda: Case("llama", chat_templates.TEXT_PARTS, "<image>\n"),
    "vicuna": lambda: Case("llama", chat_templates.VICUNA, "<image>\n"),
    "mistral": lambda: Case("mistral", chat_templates.MISTRAL, "<image>\n"),
    "llama 3": lambda: Case("llama3", chat_templates.packaged("llama3"), "<image>\n"),
    "qwen": lambda: Case("qwen", chat_templates.QWEN_VL),
    "qwen, with BOS": lambda: Case("qwen", "{{ bos_token }}" + chat_templates.QWEN_VL),
    "qwen 3, text": lambda: Case("qwen", chat_templates.packaged("qwen"), QWEN_IMAGE),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.fixture
def pictures_in_text() -> Any:
    """Templates of language models get their pictures in the text, and a warning says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chat template takes only text")
        yield


@pytest.mark.exhaustive
@pytest.mark.parametrize("n_images", range(4))
def test_prompts_have_the_ids_of_hugging_faces_processor(
    case: Case, n_images: int, pictures_in_text: None
) -> None:
    pictures = llava.make_images(n_images, size=(56, 42))
    for prompt in PROMPTS:
        inputs = case.model.prepare([pictures or None], [prompt])
        assert len(inputs.grids[0]) == n_images
        assert inputs.input_ids[0].tolist() == case.expected_ids(prompt, pictures), prompt


@pytest.mark.parametrize("n_images", [0, 2])
def test_an_answer_has_the_ids_of_hugging_faces_processor(
    case: Case, n_images: int, pictures_in_text: None
) -> None:
    """Numbers, CJK and apostrophes: ids are those of the conversation that the template writes with them."""
    pictures = llava.make_images(n_images, size=(56, 42))
    for answer in ANSWERS:
        inputs = case.model.prepare([pictures or None], ["What is it?"], [answer])
        assert inputs.answer_mask is not None
        tokens = inputs.input_ids[0][inputs.answer_mask[0]]
        assert case.model.tokenizer.decode(tokens).strip() == answer
        assert torch.equal(inputs.input_ids[0][-len(tokens) :], tokens)
        assert tokens.tolist() == case.model.continuation("What is it?", answer, n_images)
        whole = case.expected_ids("What is it?", pictures, answer)
        if "<think>" not in case.model.tokenizer.decode(whole):  # no thoughts are asked of Qwen 3
            assert inputs.input_ids[0].tolist() == whole[: inputs.input_ids.shape[1]], answer
