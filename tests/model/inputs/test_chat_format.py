"""Chat templates as checkpoints have them: one BOS, pictures in every form, what is refused and why."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chat_templates, random_llava, random_qwen
from transformers import AutoProcessor

from hones_lens import HookedVLM
from hones_lens.app.tiny.tiny_tokenizer import LLAVA_CHAT, build_llava_tokenizer
from hones_lens.model.qwen_like import QwenProcessor

PROMPT = "is it red?"
PICTURE = random_llava.make_images(1)[0]
TEXT_ONLY = "the chat template takes only text as a message's content: each image is written as '<image>"


def with_template(model: HookedVLM, template: Any) -> HookedVLM:
    """The model with this template in its processor, and none in its tokenizer."""
    model.processor.chat_template, model.tokenizer.chat_template = template, None
    return model


@pytest.fixture(scope="module")
def llava() -> HookedVLM:
    return random_llava.make_pair()[1]


@pytest.fixture(scope="module")
def qwen() -> HookedVLM:
    return random_qwen.make_pair()[1]


# -- one BOS ---------------------------------------------------------------------------------------


def test_bos_stands_once_where_template_and_tokenizer_both_bring_it(llava: HookedVLM) -> None:
    bos = llava.tokenizer.bos_token_id
    assert llava.tokenizer("red").input_ids[0] == bos, "the tokenizer brings one by itself"
    with_template(llava, chat_templates.LLAVA_WITH_BOS)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": PROMPT}]
    expected = llava.processor.apply_chat_template(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
        tokenize=True,
    )
    inputs = llava.prepare(PICTURE, PROMPT, "red")
    assert inputs.input_ids[0].tolist() == expected[0][: inputs.input_ids.shape[1]]
    assert inputs.input_ids[0].tolist().count(bos) == 1
    assert llava.continuation(PROMPT, "red") == inputs.input_ids[0][inputs.answer_mask[0]].tolist()
    text = llava.render(PROMPT, [int(inputs.image_mask.sum())])
    prepared = llava.prepare(PICTURE, PROMPT).input_ids
    assert text.startswith("<s>")
    assert torch.equal(llava.to_tokens(text), prepared)
    assert torch.equal(llava.to_tokens(text, prepend_bos=True), prepared)
    bound = llava.bind(llava.prepare(PICTURE, PROMPT))
    other = bound.texts[0].replace("red", "blue")
    assert torch.equal(bound.as_inputs(other).input_ids, llava.prepare(PICTURE, "is it blue?").input_ids)


@pytest.mark.parametrize("template", [chat_templates.LLAVA, chat_templates.LLAVA_WITH_BOS])
def test_prepend_bos_of_prepare(llava: HookedVLM, template: str) -> None:
    with_template(llava, template)
    images, prompts = [PICTURE, None], [PROMPT, "what color is the large circle on the left?"]
    usual = llava.prepare(images, prompts, ["red", "blue"])
    rows_equal = random_llava.rows_equal
    rows_equal(llava.prepare(images, prompts, ["red", "blue"], prepend_bos=True), usual)
    without = llava.prepare(images, prompts, ["red", "blue"], prepend_bos=False)
    for row in range(2):
        mask, bare = usual.attention_mask[row].bool(), without.attention_mask[row].bool()
        assert torch.equal(without.input_ids[row][bare], usual.input_ids[row][mask][1:])
        assert torch.equal(without.question_mask[row][bare], usual.question_mask[row][mask][1:])
        assert torch.equal(without.answer_mask[row][bare], usual.answer_mask[row][mask][1:])


def test_prepend_bos_of_plain_text(llava: HookedVLM, qwen: HookedVLM) -> None:
    bos = llava.tokenizer.bos_token_id
    bare = llava.tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert llava.to_tokens(PROMPT).tolist() == [[bos, *bare]]
    assert llava.to_tokens(PROMPT, prepend_bos=True).tolist() == [[bos, *bare]]
    assert llava.to_tokens(PROMPT, prepend_bos=False).tolist() == [bare]
    assert llava.to_str_tokens(PROMPT, prepend_bos=True)[0] == "<s>"
    assert "<s>" not in llava.to_str_tokens(PROMPT, prepend_bos=False)
    assert "<s>" not in qwen.to_str_tokens(PROMPT)
    for call in (qwen.to_tokens, qwen.to_str_tokens, lambda *a, **k: qwen.prepare(None, *a, **k)):
        with pytest.raises(ValueError, match="prepend_bos=True, but this tokenizer has no BOS token"):
            call(PROMPT, prepend_bos=True)


def test_prepend_bos_where_the_tokenizer_brings_none(llava: HookedVLM, monkeypatch: Any) -> None:
    monkeypatch.setattr(llava.processor, "tokenizer", build_llava_tokenizer(512))
    bos, bare = llava.tokenizer.bos_token_id, llava.tokenizer(PROMPT).input_ids
    assert bare[0] != bos
    assert llava.to_tokens(PROMPT).tolist() == llava.to_tokens(PROMPT, prepend_bos=False).tolist() == [bare]
    assert llava.to_tokens(PROMPT, prepend_bos=True).tolist() == [[bos, *bare]]
    with_template(llava, chat_templates.LLAVA)
    plain, front = (llava.prepare(PICTURE, PROMPT, prepend_bos=choice) for choice in (None, True))
    assert front.input_ids[0].tolist() == [bos, *plain.input_ids[0].tolist()]
    assert front.question_mask[0].tolist() == [False, *plain.question_mask[0].tolist()]


# -- templates that take no pictures ---------------------------------------------------------------


def test_a_warning_where_pictures_are_written_into_the_text(llava: HookedVLM, qwen: HookedVLM) -> None:
    with_template(llava, chat_templates.VICUNA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llava.render(PROMPT, []) == f"<s>USER: {PROMPT}\nASSISTANT:"
    with pytest.warns(UserWarning, match=TEXT_ONLY):
        assert llava.render(PROMPT, [2, 1]) == (f"<s>USER: <image><image>\n<image>\n{PROMPT}\nASSISTANT:")
    stock = qwen.processor.chat_template
    with_template(qwen, "{{ messages[0]['content'] + '!' }}")
    with pytest.warns(UserWarning, match=r"written as '<\|vision_start\|><\|image_pad\|><\|vision_end\|>'"):
        assert qwen.render(PROMPT, [2]) == (
            f"<|vision_start|><|image_pad|><|image_pad|><|vision_end|>{PROMPT}!"
        )
    with_template(qwen, stock)


BLIND = "{% set text = messages[0]['content'] | replace('<image>', '') %}USER: {{ text }}"
REFUSED = {
    "given a list of parts it prints the list, given a string it writes 0 image tokens for one image": BLIND,
    r"given a list of parts it raises TypeError \(can only .*, given a string it writes 2 image tokens": (
        "{{ 'USER: ' + messages[0]['content'] + messages[0]['content'] }}"
    ),
    r"given a list of parts it raises TemplateError \(no\), given a string it raises TemplateError \(no\)": (
        "{% if '<image>' in messages[0]['content'] or messages[0]['content'] is not string %}"
        "{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_template_that_can_not_take_pictures_is_refused(llava: HookedVLM, reason: str) -> None:
    with_template(llava, REFUSED[reason])
    assert PROMPT in llava.render(PROMPT, [])
    with pytest.raises(ValueError, match=f"the chat template can't take pictures: {reason}"):
        llava.prepare(PICTURE, PROMPT)


def test_a_template_that_takes_nothing_is_refused(llava: HookedVLM) -> None:
    with_template(llava, "USER: hello")
    with pytest.raises(ValueError, match=r"the chat template can't take a prompt: .*leaves out the prompt"):
        llava.prepare(None, PROMPT)


def test_a_template_with_one_place_for_many_pictures_is_refused(llava: HookedVLM) -> None:
    with_template(
        llava, "{{ '<image>' if messages[0].content | length > 1 }}{{ messages[0].content[-1].text }}"
    )
    assert llava.render(PROMPT, [1]) == f"<image>{PROMPT}"
    with pytest.raises(ValueError, match="1 image tokens '<image>' in the prompt for 2 images"):
        llava.prepare([PICTURE, PICTURE], PROMPT)


def test_several_templates_need_a_default(llava: HookedVLM) -> None:
    with_template(llava, {"default": chat_templates.LLAVA, "rag": "no"})
    assert llava.render(PROMPT, []) == f"USER: {PROMPT} ASSISTANT:"
    with_template(llava, {"chat": chat_templates.LLAVA, "rag": "no"})
    with pytest.raises(ValueError, match="none of the chat templates chat, rag is named 'default'"):
        llava.render(PROMPT, [])


# -- prompts that are in chat format already -------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "held"),
    [
        ("USER: <image>\nis it red? ASSISTANT:", "'<image>' and 'USER:' and 'ASSISTANT:'"),
        ("<image>\nis it red?", "'<image>'"),
        ("USER: is it red? ASSISTANT:", "'USER:' and 'ASSISTANT:'"),
    ],
)
def test_raw_prompts_of_llava(llava: HookedVLM, raw: str, held: str) -> None:
    with_template(llava, chat_templates.LLAVA)
    for call in (lambda: llava.prepare(PICTURE, raw), lambda: llava.prepare([None], [raw])):
        with pytest.raises(ValueError, match=f"already holds {held}: prepare adds the chat format"):
            call()


@pytest.mark.parametrize("marker", ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_raw_prompts_of_qwen(qwen: HookedVLM, marker: str) -> None:
    for picture in (PICTURE, None):
        with pytest.raises(ValueError, match=r"already holds '.*': prepare adds the chat format") as raised:
            qwen.prepare([picture], [f"{marker}{PROMPT}"])
        assert f"already holds {marker!r}" in str(raised.value)
    raw = qwen.render(PROMPT, [])
    with pytest.raises(ValueError, match=r"already holds '<\|im_start\|>system"):
        qwen.prepare(PICTURE, raw)


def test_words_of_the_chat_format_are_no_chat_format(llava: HookedVLM) -> None:
    with_template(llava, chat_templates.LLAVA)
    for prompt in ("USER: is it red?", "is it red? ASSISTANT:", "an image", "< image >", "<s>"):
        assert llava.render(prompt, []) == f"USER: {prompt} ASSISTANT:"


# -- tokenizers without the model's image token ----------------------------------------------------


def test_a_tokenizer_without_the_image_token() -> None:
    config = random_llava.make_config()
    places = {
        "None": len(build_llava_tokenizer(512)) + 1,
        "'▁blue'": build_llava_tokenizer(512).convert_tokens_to_ids("▁blue"),
        "'<pad>', and calls '<image>' its image token": config.text_config.pad_token_id,
    }
    assert places["'▁blue'"] != build_llava_tokenizer(512).unk_token_id
    for found, token_id in places.items():
        config.image_token_index = token_id
        model = random_llava.make_pair(config)[1]
        with_template(model, chat_templates.LLAVA)
        reason = f"does not have the model's image token: at image_token_id={token_id} it has {found}"
        for call in (lambda m=model: m.prepare(PICTURE, PROMPT), lambda m=model: m.image_token):
            with pytest.raises(ValueError, match=reason):
                call()
        assert model.prepare(None, PROMPT).input_ids.shape[0] == 1, "text alone needs no image token"


# -- where the template is read from ---------------------------------------------------------------


def write_templates(folder: Path, **by_file: str | None) -> None:
    """Bring a saved folder's chat templates into these files alone: `tokenizer`, `json` (legacy), `jinja`."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    settings.pop("chat_template", None)
    if by_file.get("tokenizer"):
        settings["chat_template"] = by_file["tokenizer"]
    config.write_text(json.dumps(settings))
    if by_file.get("json"):
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": by_file["json"]}))
    if by_file.get("jinja"):
        (folder / "chat_template.jinja").write_text(str(by_file["jinja"]))


FILES = [
    {"tokenizer": chat_templates.VICUNA, "json": LLAVA_CHAT},
    {"json": chat_templates.LLAVA},
    {"jinja": chat_templates.LLAVA_WITH_BOS},
    {"tokenizer": chat_templates.LLAVA},
    {},
]


@pytest.mark.parametrize("files", FILES, ids=lambda files: " and ".join(files) or "none")
def test_the_files_of_a_llava_checkpoint(tmp_path: Path, llava: HookedVLM, files: dict[str, str]) -> None:
    hf_model = random_llava.make_hf()
    hf_model.save_pretrained(tmp_path)
    random_llava.make_processor().save_pretrained(tmp_path)
    write_templates(tmp_path, **files)
    ids = HookedVLM.from_pretrained(str(tmp_path)).prepare(PICTURE, PROMPT).input_ids
    theirs: Any = AutoProcessor.from_pretrained(str(tmp_path))
    if "json" not in files and "jinja" not in files:
        assert theirs.chat_template is None, "Hugging Face reads a processor's template from its files alone"
        theirs.chat_template = files.get("tokenizer", chat_templates.LLAVA)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": PROMPT}]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True
    )
    assert ids.tolist() == [list(row) for row in expected]


QWEN_SHORT = chat_templates.QWEN_VL.replace("You are a helpful assistant.", "You are brief.")


@pytest.mark.parametrize("file", ["json", "jinja", "tokenizer"])
def test_the_files_of_a_qwen_checkpoint(tmp_path: Path, qwen: HookedVLM, file: str) -> None:
    qwen.processor.save_pretrained(tmp_path)
    text_only = "{{ messages[0]['content'] + '!' }}"
    write_templates(tmp_path, **{"tokenizer": text_only, file: QWEN_SHORT})
    read = QwenProcessor.from_pretrained(str(tmp_path))
    assert read.chat_template == QWEN_SHORT
    read.tokenizer.chat_template = text_only
    again = tmp_path / "again"
    read.save_pretrained(again)
    assert QwenProcessor.from_pretrained(str(again)).chat_template == QWEN_SHORT
