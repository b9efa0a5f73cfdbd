"""What hooks cost: forward and cache of a plain decoder against Hugging Face's sdpa forward."""

from __future__ import annotations

from functools import cache
from typing import Any

import tiny
import torch
from transformers import LlavaForConditionalGeneration

from hones_lens import HookedVLM
from hones_lens.inputs import VLMInputs

TOKENS, BATCH = 300, 4


@cache
def model_and_inputs() -> tuple[Any, HookedVLM, VLMInputs]:
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    config = tiny.make_config(text={**text, "num_attention_heads": 8, "num_key_value_heads": 8})
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    hf_model = LlavaForConditionalGeneration(config).eval()
    model = HookedVLM.from_hf(hf_model, tiny.processor_for(config))
    ids = torch.randint(20, 200, (BATCH, TOKENS))
    return hf_model, model, model.as_inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_forward(compare) -> None:
    hf_model, model, inputs = model_and_inputs()
    hf = inputs.to_hf()
    compare(
        "forward, no hooks: HF / ours", (lambda: hf_model(**hf), 1), (lambda: model(inputs), 1), "≥ 0.97×", 15
    )


def test_cache(compare) -> None:
    hf_model, model, inputs = model_and_inputs()
    hf = inputs.to_hf()
    compare(
        "full cache: HF forward / ours",
        (lambda: hf_model(**hf), 1),
        (lambda: model.run_with_cache(inputs), 1),
        "≥ 0.87×",
        15,
    )
