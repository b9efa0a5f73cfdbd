"""Prompts in the true vocabularies: ids are those of Hugging Face's tokenizer and chat template."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava as llava, random_qwen as qwen, real_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor

from hones_lens import HookedVLM
from hones_lens.model.families.qwen2_5_vl import QwenProcessor

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


@pytest.fixture(scope="module")
def llava_model() -> HookedVLM:
    tokenizer = real_tokenizers.fresh("llama")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    tokenizer.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    template = llava.build_llava_tokenizer(512).chat_template
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": llava.SIZE}, crop_size={"height": llava.SIZE, "width": llava.SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=llava.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = llava.make_config({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    config.image_token_index = tokenizer.image_token_id
    return HookedVLM.from_hf(llava.make_hf(config), processor)


@pytest.fixture(scope="module")
def qwen_model() -> HookedVLM:
    tokenizer = real_tokenizers.fresh("qwen")
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    config = qwen.make_config({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id})
    for name, value in ids.items():
        setattr(config, name, value)
    made = qwen.make_processor(config)
    tokenizer.chat_template = made.tokenizer.chat_template
    return HookedVLM.from_hf(
        qwen.make_hf(config), QwenProcessor(made.image_processor, tokenizer, tokenizer.chat_template)
    )


def expected_ids(model: HookedVLM, prompt: str, sizes: list[int]) -> list[int]:
    """Hugging Face's template, written out and tokenized by its tokenizer, each picture's token repeated."""
    tokenizer = model.processor.tokenizer
    content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=model.processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    image = tokenizer.convert_ids_to_tokens(model.cfg.image_token_id)
    first, *rest = text.split(image)
    for size, part in zip(sizes, rest, strict=True):
        first += image * size + part
    return tokenizer(first).input_ids


@pytest.mark.parametrize("n_images", range(4))
@pytest.mark.parametrize("family", ["llava_model", "qwen_model"])
def test_prompts_have_the_ids_of_the_template(
    family: str, n_images: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    pictures = llava.make_images(n_images, size=(56, 42)) or None
    for prompt in PROMPTS:
        inputs = model.prepare([pictures], [prompt])
        sizes = [rows * columns for rows, columns in inputs.grids[0]]
        assert len(sizes) == n_images
        assert inputs.input_ids[0].tolist() == expected_ids(model, prompt, sizes), prompt


@pytest.mark.parametrize("family", ["llava_model", "qwen_model"])
def test_an_answer_is_what_the_tokenizer_makes_of_prompt_and_answer(
    family: str, request: pytest.FixtureRequest
) -> None:
    """Numbers, CJK and apostrophes: their tokens decode to the answer, and stand where the answer stands."""
    model = request.getfixturevalue(family)
    (picture,) = llava.make_images(1, size=(56, 42))
    for answer in ANSWERS:
        inputs = model.prepare([picture], ["What is it?"], [answer])
        assert inputs.answer_mask is not None
        tokens = inputs.input_ids[0][inputs.answer_mask[0]]
        assert model.tokenizer.decode(tokens).strip() == answer
        assert torch.equal(inputs.input_ids[0][-len(tokens) :], tokens)
        assert tokens.tolist() == model.continuation("What is it?", answer)
