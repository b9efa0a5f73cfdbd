"""The engine against the naive loop, for the families and decoders that `test_sweep.py` does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import random_llava
from helpers.families import SHAPE_PARAMS, family_pair
from helpers.hf_task_loops import plain_examples

from hones_lens import engine
from hones_lens.data.examples import Example
from hones_lens.engine import SweepOptions, Tally, full_passes
from hones_lens.interventions import replace_with_other_heads_mean, scale, zero_head, zero_neurons
from hones_lens.interventions.hooks import position_wise
from hones_lens.model import HookedVLM, RMSNorm
from hones_lens.tasks import Task, load_task

NAMES = [param for param in SHAPE_PARAMS if param.values[0] not in ("llava", "qwen2_5_vl")]


@position_wise
def half(x: torch.Tensor, hook: object) -> torch.Tensor:
    return x / 2


def arms_of(model: HookedVLM) -> list:
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    arms = [[replace_with_other_heads_mean(layer, h)] for layer in range(layers) for h in range(heads)]
    arms += [[replace_with_other_heads_mean(layer, 1, positions="last")] for layer in range(layers)]
    arms += [
        [],
        [zero_head(1, 0)],
        zero_neurons([(1, 4), (0, 3)]),
        [scale("blocks.1.mlp.hook_post", [2], 3.0)],
    ]
    names = [name for name in model.hook_dict if name.startswith(("blocks.0.", "blocks.1."))]
    some = [name for name in names if not name.endswith(("attn_scores", "pattern"))][::5]
    own = [name for name in names if name.endswith(("hook_deepstack", "hook_q_norm", "k_norm.hook_scale"))]
    return arms + [[(name, half)] for name in dict.fromkeys((*some, *own))]


def spoken(model: HookedVLM, task: Task, example: Example) -> Example:
    """With the answer that the model gives, so that an intervention has something to change."""
    said = model.generate(model.prepare(example.image, task.prompts(example)[0]), 24)
    return replace(example, answers=(said[0] or "nothing",))


@pytest.mark.parametrize("task_name", [pytest.param("vqa", marks=pytest.mark.exhaustive), "retrieval"])
@pytest.mark.parametrize("name", NAMES)
def test_all_cells_equal_the_naive_loop(name: str, task_name: str) -> None:
    model, task = family_pair(name).model, load_task(task_name)
    examples = list(plain_examples(task_name, 3))
    if task_name == "vqa":
        examples = [spoken(model, task, example) for example in examples]
    arms, tally = arms_of(model), Tally()
    options = SweepOptions(progress=False, tally=tally)
    found = [outcome.scores for outcome in engine.measure(model, task, examples, arms, options)]
    batches = list(engine.prompt_batches(model, task, examples, 1))
    expected = [
        [task.score(full_passes.predict(model, task, b, hooks)[0], b.examples[0]) for b in batches]
        for hooks in arms
    ]
    different = sum(a != b for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))
    assert different <= tally.near_ties <= 3
    assert tally.full == 0
    log_probs = engine.measure_log_probs(model, task, examples, arms, SweepOptions(progress=False))
    for hooks, values in zip(arms, log_probs, strict=True):
        if any(getattr(edit, "last_position_only", False) for _, edit in hooks):
            continue  # an answer that is given has its own last position
        naive = [
            float(value)
            for batch in engine.answer_batches(model, task, examples, 1)
            for value in full_passes.log_probs(model, batch, hooks)
        ]
        assert values == pytest.approx(naive, abs=1e-4, rel=1e-5), hooks
    assert len({tuple(values) for values in log_probs}) > len(arms) // 2, "the arms do next to nothing"


def test_a_norm_behind_the_heads_leaves_no_shortcut() -> None:
    """Also where the norm before the neurons is one that heads have a shortcut through."""
    _, model = random_llava.make_pair(seed=8)
    for block in model.blocks:
        block.ln1_post = RMSNorm(model.cfg.d_model, 1e-3)
        block.ln1_post.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    model.setup()
    task, examples = load_task("vqa"), list(plain_examples("vqa", 1))
    arms = [[replace_with_other_heads_mean(layer, 1)] for layer in range(model.cfg.n_layers)]
    found = engine.measure_log_probs(model, task, examples, arms, SweepOptions(progress=False))
    (batch,) = engine.answer_batches(model, task, examples, 1)
    for hooks, values in zip(arms, found, strict=True):
        expected = [float(value) for value in full_passes.log_probs(model, batch, hooks)]
        assert values == pytest.approx(expected, abs=1e-4, rel=1e-5), hooks
