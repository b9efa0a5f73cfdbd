"""Sweeps of models with a generation config: answers are those of Hugging Face's `generate` on them."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import Any

import pytest
import torch
from helpers.hf_task_loops import FAMILIES, N_LAYERS, fresh_pair, hf_answer, hf_input_hook, hf_layers

from hones_lens import Decoding, HookedVLM, engine, evaluate
from hones_lens.data.loading import load_examples
from hones_lens.engine import Sweep, SweepOptions, Tally, full_passes
from hones_lens.interventions.hooks import replace_with_other_heads_mean, zero_neurons
from hones_lens.tasks.registry import load_task

CONFIGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "several": {
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 6,
        "begin_suppress_tokens": [125, 543],
        "forced_eos_token_id": 7,
    },
}
NEURONS = ([(1, 4), (2, 7)], [(0, 3), (0, 9), (1, 1)], [(2, i) for i in range(10)])


def checkpoint(family: str, config: dict[str, Any]) -> tuple[Any, HookedVLM]:
    hf, model = fresh_pair(family=family)
    for name, value in config.items():
        setattr(hf.generation_config, name, value)
    return hf, HookedVLM.from_hf(hf, model.processor)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_answers_under_interventions_equal_hugging_face_s(family: str, config: str) -> None:
    hf, model = checkpoint(family, CONFIGS[config])
    task, examples = load_task("vqa"), load_examples("shapes", "vqa", "test", limit=3)
    heads = [[replace_with_other_heads_mean(layer, h)] for layer in range(N_LAYERS) for h in (0, 2)]
    late = [[replace_with_other_heads_mean(layer, 1, positions="last")] for layer in range(N_LAYERS)]
    arms = [[], *map(zero_neurons, NEURONS), *heads, *late]
    tally, found = Tally(), [list[str]() for _ in arms]
    sweep = Sweep(model, arms, SweepOptions(tally=tally))
    for batch in engine.prompt_batches(model, task, examples, 2):
        for texts, said in zip(found, sweep.predictions(task, batch), strict=True):
            texts += said
    assert tally.decoded > 5 and tally.full == 0
    for cells, texts in zip(([], *NEURONS), found, strict=False):
        assert texts == [
            _hf_said(hf, model, example, cells, task.prompts(example)[0]) for example in examples
        ]
    for batch in engine.prompt_batches(model, task, examples, 4):  # padded
        expected = [full_passes.predict(model, task, batch, hooks) for hooks in arms]
    assert sum(a != b for a, b in zip(chain(*found), chain(*expected), strict=True)) <= tally.near_ties <= 2
    model.decoding = Decoding()
    plain = Sweep(model, arms).predictions(task, next(iter(engine.prompt_batches(model, task, examples, 4))))
    assert plain != found, "the settings are too weak to show"


def _hf_said(hf: Any, model: HookedVLM, example: Any, cells: list[tuple[int, int]], prompt: str) -> str:
    """What Hugging Face's model answers while these neurons are zero."""
    with ExitStack() as stack:
        for layer, index in cells:
            place = torch.tensor([index])
            stack.enter_context(
                hf_input_hook(
                    hf_layers(hf)[layer].mlp.down_proj, lambda x, place=place: x.index_fill(-1, place, 0.0)
                )
            )
        return hf_answer(hf, model, example.image, prompt)


def test_evaluation_decodes_as_the_checkpoint_says() -> None:
    hf, model = checkpoint("llava", CONFIGS["repetition_penalty"])
    task, examples = load_task("caption"), load_examples("shapes", "caption", "test", limit=3)
    said = [hf_answer(hf, model, example.image, task.prompts(example)[0]) for example in examples]
    found = evaluate(model, task, examples, progress=False)
    expected = [task.score(text, example) for text, example in zip(said, examples, strict=True)]
    assert found.scores == pytest.approx(expected)


def test_a_sweep_refuses_what_generate_refuses() -> None:
    _, model = checkpoint("llava", {"num_beams": 4})
    examples = load_examples("shapes", "vqa", "test", limit=2)
    with pytest.raises(ValueError, match="num_beams=4"):
        evaluate(model, "vqa", examples, progress=False)
