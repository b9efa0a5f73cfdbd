"""Tiny random models, examples that they get partly right, and Hugging Face's own loops on them.

The examples' answers are what the clean model says, so that interventions have something to lose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import random_llava, random_qwen
from hones_lens import HookedVLM
from hones_lens.data.examples import Example
from hones_lens.data.loading import load_examples
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task

N_LAYERS, N_HEADS, D_MLP = 3, 4, 20
TEXT_TASKS = ("vqa", "ocr", "caption")
ALL_TASKS = (*TEXT_TASKS, "retrieval")
FAMILIES = {"llava": random_llava, "qwen": random_qwen}
NEW_TOKENS = 24
# For loops that take seconds a case. What is generated takes one path whatever the task: one task of a family
# always runs, and so does retrieval, which ranks; all others in `make test-all`.
_ALWAYS = {("vqa", "llava"), ("caption", "qwen"), ("retrieval", "llava"), ("retrieval", "qwen")}
TASK_OF_FAMILY = pytest.mark.parametrize(
    ("name", "family"),
    [
        pytest.param(*case, id="-".join(case), marks=() if case in _ALWAYS else pytest.mark.exhaustive)
        for case in itertools.product(ALL_TASKS, FAMILIES)
    ],
)
# w of heads (layer, head), as if localized.
WEIGHTS = {(0, 1): 0.5, (1, 3): 0.2, (2, 0): 0.1, (1, 0): -0.3, (0, 2): 0.0}


def fresh_pair(seed: int = 0, family: str = "llava") -> tuple[Any, HookedVLM]:
    """A random Hugging Face model (GQA, 3 layers of 4 heads and 20 neurons), and the same one hooked."""
    text = {
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": 2,
        "intermediate_size": D_MLP,
    }
    vision = {"llava": {"num_hidden_layers": 2}, "qwen": {"depth": 2, "window_size": 28}}[family]
    return FAMILIES[family].make_pair(FAMILIES[family].make_config(text=text, vision=vision), seed)


@cache
def pair(family: str = "llava") -> tuple[Any, HookedVLM]:
    """The one of a family that tests share and do not change."""
    return fresh_pair(family=family)


@cache
def examples_of(name: str, n: int = 3, family: str = "llava") -> tuple[Example, ...]:
    """Examples of a task; the clean model answers all but the last one right."""
    examples = plain_examples(name, n)
    if name == "retrieval":
        return examples
    task = load_task(name)
    said = [hf_answer(*pair(family), example.image, task.prompts(example)[0]) for example in examples]
    assert all(said), "the random model says nothing: choose another seed"
    fields = {"vqa": lambda s: {"answers": (s,)}, "ocr": lambda s: {"text": s}}
    made = fields.get(name, lambda s: {"references": (s, "a small red circle")})
    right = [replace(example, **made(text)) for example, text in zip(examples, said, strict=True)]
    return (*right[:-1], examples[-1])


@cache
def plain_examples(name: str, n: int = 3) -> tuple[Example, ...]:
    """Examples with the world's own answers, which are short."""
    examples = load_examples("shapes", name, "test", limit=n)
    return (
        tuple(_few_candidates(e, i) for i, e in enumerate(examples))
        if name == "retrieval"
        else tuple(examples)
    )


def _few_candidates(example: Example, place: int) -> Example:
    caption = example.candidates[example.positive]
    others = [c for c in example.candidates if c != caption][:3]
    return replace(example, candidates=(*others[:place], caption, *others[place:]), positive=place)


@cache
def critical_heads(task: str = "vqa", top_k: int = 3, family: str = "llava") -> HeadScores:
    """Heads as if localized: three with a positive w, one with a negative one."""
    _, model = pair(family)
    scores = torch.full((N_LAYERS, model.cfg.n_heads), -1.0, dtype=torch.float64)
    for cell, weight in WEIGHTS.items():
        scores[cell] = weight
    return HeadScores(
        task=task,
        metric_name="metric",
        intervention="replace_with_other_heads_mean",
        model_name=model.cfg.model_name,
        scores=scores,
        drops=scores[..., None],
        baseline=1.0,
        base_scores=torch.ones(1, dtype=torch.float64),
        example_ids=("a",),
        kinds=("",),
        top_k=top_k,
    )


# -- Hugging Face's model, one example at a time ------------------------------------------------------


def hf_inputs(model: HookedVLM, image: Any, prompt: str, answer: str = "") -> dict[str, Tensor]:
    """What the processor returns for one picture and one prompt, with an answer behind it."""
    if model.family == "qwen2_5_vl":
        return qwen_inputs(model, image, prompt, answer)
    text = hf_text(model, prompt) + (f" {answer}" if answer else "")
    return dict(model.processor(images=image, text=text, return_tensors="pt"))


def qwen_inputs(model: HookedVLM, image: Any, prompt: str, answer: str) -> dict[str, Tensor]:
    """The same for Qwen, whose processor Hugging Face can't build here: its parts, put together."""
    tokenizer = model.processor.tokenizer
    made = model.processor.image_processor(images=[image], return_tensors="pt")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * (int(made["image_grid_thw"].prod()) // 4)
        + f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {**made, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}


def hf_text(model: HookedVLM, prompt: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    chat = [{"role": "user", "content": content}]
    return model.processor.apply_chat_template(chat, add_generation_prompt=True)


def hf_answer(hf_model: Any, model: HookedVLM, image: Any, prompt: str) -> str:
    """What Hugging Face's `generate` says."""
    inputs = hf_inputs(model, image, prompt)
    out = hf_model.generate(**inputs, max_new_tokens=NEW_TOKENS, max_length=None, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@torch.no_grad()
def hf_margins(hf_model: Any, model: HookedVLM, example: Example, task: Task) -> list[float]:
    """logit(Yes) − logit(No) of each candidate by Hugging Face's logits."""
    margins = []
    for prompt in task.prompts(example):
        logits = hf_model(**hf_inputs(model, example.image, prompt)).logits[0, -1]
        yes, no = (answer_ids(model, example.image, prompt, word)[0] for word in ("Yes", "No"))
        margins.append(float(logits[yes] - logits[no]))
    return margins


def answer_ids(model: HookedVLM, image: Any, prompt: str, answer: str) -> list[int]:
    """The tokens that an answer adds to its prompt."""
    before = hf_inputs(model, image, prompt)["input_ids"][0].tolist()
    after = hf_inputs(model, image, prompt, answer)["input_ids"][0].tolist()
    assert after[: len(before)] == before
    return after[len(before) :]


def hf_log_prob(hf_model: Any, model: HookedVLM, example: Example, task: Task) -> Tensor:
    """Log-probability of the right answer by Hugging Face's logits, token by token; differentiable."""
    prompt = task.target_prompt(example)
    ids = answer_ids(model, example.image, prompt, task.answer(example))
    logits = hf_model(**hf_inputs(model, example.image, prompt, task.answer(example))).logits[0]
    total = torch.zeros(())
    for k, token in enumerate(ids):
        row = logits[len(logits) - len(ids) + k - 1]
        total = total + row[token] - row.logsumexp(-1)
    return total


def hf_prediction(hf_model: Any, model: HookedVLM, example: Example, task: Task) -> Any:
    """What a task scores: an answer, or margins."""
    if task.ranks:
        return hf_margins(hf_model, model, example, task)
    return hf_answer(hf_model, model, example.image, task.prompts(example)[0])


def hf_layers(hf_model: Any) -> Sequence[Any]:
    return hf_model.model.language_model.layers


@contextmanager
def hf_input_hook(module: Any, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Change (or look at) what a Hugging Face module is given."""

    def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def other_heads_mean(head: int) -> Callable[[Tensor], Tensor]:
    """eq. H1 in plain loops, on the input of `o_proj`, [1 pos head·d_head]."""

    def change(x: Tensor) -> Tensor:
        d_head = x.shape[-1] // N_HEADS
        parts = [x[..., h * d_head : (h + 1) * d_head] for h in range(N_HEADS)]
        mean = sum(part for h, part in enumerate(parts) if h != head) / (N_HEADS - 1)
        return torch.cat([mean if h == head else part for h, part in enumerate(parts)], dim=-1)

    return change
