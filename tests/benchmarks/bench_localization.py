"""Head localization: the engine against one-at-a-time generation with forward pre-hooks on HF's model."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from helpers import random_llava
from helpers.hf_task_loops import hf_input_hook, hf_inputs, hf_layers
from transformer_lens.model_bridge.sources.transformers import boot
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import hones_lens as hl
from hones_lens import HookedVLM, localize_heads
from hones_lens.data.shapes import TASKS
from hones_lens.engine import full_passes
from hones_lens.engine.speculation import Tally
from hones_lens.hones.attribution.head_scores import all_heads
from hones_lens.interventions.hooks import replace_with_other_heads_mean
from hones_lens.tasks.registry import load_task

BARS = {"vqa": 20, "ocr": 28, "caption": 25, "retrieval": 50}
NAIVE_CELLS = {"vqa": 24, "ocr": 24, "caption": 16, "retrieval": 2}  # sampled anew in each round
N_EXAMPLES, ROUNDS = 64, 5


@cache
def shipped(name: str) -> tuple[Any, HookedVLM]:
    folder = hl.checkpoint_path(name)
    hf_model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return hf_model, HookedVLM.from_pretrained(name)


def other_heads_mean(head: int, n_heads: int):
    def change(x: torch.Tensor) -> torch.Tensor:
        z = x.unflatten(-1, (n_heads, -1)).clone()
        z[..., head, :] = (z.sum(-2) - z[..., head, :]) / (n_heads - 1)
        return z.flatten(-2)

    return change


def naive_cell(hf_model: Any, model: HookedVLM, task: Any, example: Any, layer: int, head: int) -> float:
    """One cell of the loop: prepare, generate (or rank) under the hook, score."""
    tokenizer = model.tokenizer
    module = hf_layers(hf_model)[layer].self_attn.o_proj
    with hf_input_hook(module, other_heads_mean(head, model.cfg.n_heads)):
        if task.ranks:
            margins = []
            yes, no = full_passes.yes_no_ids(model, task.prompts(example)[0])
            for prompt in task.prompts(example):
                logits = hf_model(**hf_inputs(model, example.image, prompt), logits_to_keep=1).logits[0, -1]
                margins.append(float(logits[yes] - logits[no]))
            return task.score(margins, example)
        inputs = hf_inputs(model, example.image, task.prompts(example)[0])
        out = hf_model.generate(**inputs, max_new_tokens=24, do_sample=False)
        said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return task.score(said, example)


def bridge_cell(bridge: Any, model: HookedVLM, task: Any, example: Any, layer: int, head: int) -> None:
    """The same cell in TransformerLens's bridge, which generates with pictures for LLaVA."""

    def change(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[..., head, :] = (z.sum(-2) - z[..., head, :]) / (z.shape[-2] - 1)
        return z

    inputs = hf_inputs(model, example.image, task.prompts(example)[0])
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    options = {"max_new_tokens": 24, "do_sample": False, "return_type": "tokens", "verbose": False}
    with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", change)]):
        out = bridge.generate(ids, pixel_values=pixels, **options)
    task.score(model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip(), example)


@pytest.mark.parametrize("task_name", TASKS)
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_shipped_models(name: str, task_name: str, speedups, note) -> None:
    hf_model, model = shipped(name)
    task, dice = load_task(task_name), random.Random(0)
    examples = hl.load_examples("shapes", task_name, "discovery", N_EXAMPLES)
    cells = all_heads(model)
    found: list[hl.HeadScores] = []
    tally = Tally()
    differing = 0

    def engine() -> None:
        found[:] = [localize_heads(model, task, examples, progress=False, tally=tally)]

    def naive() -> None:
        nonlocal differing
        for _ in range(NAIVE_CELLS[task_name]):
            (layer, head), i = dice.choice(cells), dice.randrange(len(examples))
            score = naive_cell(hf_model, model, task, examples[i], layer, head)
            if found:  # by the warm call
                differing += float(found[0].base_scores[i]) - score != float(found[0].drops[layer, head, i])

    others = {"HF, one at a time": (naive, NAIVE_CELLS[task_name])}
    if name == "tiny-llava" and not task.ranks:
        bridge, bridges_dice = boot(str(hl.checkpoint_path(name)), device="cpu"), random.Random(0)

        def by_bridge() -> None:
            for _ in range(NAIVE_CELLS[task_name]):
                cell, example = bridges_dice.choice(cells), bridges_dice.choice(examples)
                bridge_cell(bridge, model, task, example, *cell)

        others["TransformerLens's bridge"] = (by_bridge, NAIVE_CELLS[task_name])

    speedups(
        f"a cell of {name}, {task_name}",
        (engine, len(cells) * len(examples)),
        others,
        f"≥ {BARS[task_name]}×",
        ROUNDS,
    )
    sampled = (ROUNDS + 1) * NAIVE_CELLS[task_name]
    note(f"{name}, {task_name}: {differing} of {sampled} sampled cells differ; the engine: {tally}")


@pytest.mark.parametrize(("task_name", "n", "bar"), [("vqa", 16, "≥ 3×"), ("retrieval", 1, "≥ 8×")])
def test_larger_model_against_the_batched_loop(task_name: str, n: int, bar: str, speedups) -> None:
    """d 512 × 8 layers, 256 image tokens, random weights; the loop runs batches on our own model."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = random_llava.make_config(text=text, vision={"image_size": 112, "patch_size": 7})
    torch.manual_seed(0)
    model = HookedVLM.from_hf(
        LlavaForConditionalGeneration(config).eval(), random_llava.processor_for(config)
    )
    task = load_task(task_name)
    examples = hl.load_examples("shapes", task_name, "discovery", n)
    arms = [[replace_with_other_heads_mean(*cell)] for cell in all_heads(model)[::4]]  # two of every layer
    picked = arms[::8]

    def engine() -> None:
        engine.measure(model, task, examples, [[], *arms], engine.SweepOptions(progress=False))

    def naive() -> None:
        for hooks in picked:
            for batch in engine.prompt_batches(model, task, examples, n):
                full_passes.predict(model, task, batch, hooks)

    speedups(
        f"a cell of a random d 512 × 8, {task_name}",
        (engine, len(arms) * n),
        {"our model, batched loop": (naive, len(picked) * n)},
        bar,
    )
