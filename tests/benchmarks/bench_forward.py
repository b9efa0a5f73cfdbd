"""What hooks cost: forward and cache of a plain decoder beside Hugging Face's sdpa forward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from helpers import random_llava
from transformer_lens.model_bridge.sources.transformers import boot
from transformers import LlavaForConditionalGeneration

from hones_lens import HookedVLM
from hones_lens.model.inputs import VLMInputs

TOKENS, BATCH, ROUNDS = 300, 4, 40
BRIDGE = "TransformerLens's bridge"


@cache
def models() -> tuple[Any, HookedVLM, VLMInputs]:
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    config = random_llava.make_config(text={**text, "num_attention_heads": 8, "num_key_value_heads": 8})
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    hf_model = LlavaForConditionalGeneration(config).eval()
    model = HookedVLM.from_hf(hf_model, random_llava.processor_for(config))
    ids = torch.randint(20, 200, (BATCH, TOKENS))
    return hf_model, model, model.as_inputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def bridge_of(hf_model: Any, model: HookedVLM, folder: Any) -> Any:
    """The same weights in TransformerLens, by way of a folder: the bridge takes its model apart."""
    hf_model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return boot(str(folder), device="cpu")


def test_forward(overheads, tmp_path) -> None:
    hf_model, model, inputs = models()
    hf, bridge = inputs.to_hf(), bridge_of(hf_model, model, tmp_path)
    assert torch.allclose(bridge(inputs.input_ids), model(inputs), atol=1e-4)
    overheads(
        "forward without hooks",
        lambda: hf_model(**hf),
        {"ours": lambda: model(inputs), BRIDGE: lambda: bridge(inputs.input_ids)},
        "upper bound ≤ 1.03×",
        ROUNDS,
    )


def test_cache(overheads, tmp_path) -> None:
    hf_model, model, inputs = models()
    hf, bridge = inputs.to_hf(), bridge_of(hf_model, model, tmp_path)
    overheads(
        "full cache",
        lambda: hf_model(**hf),
        {
            "ours": lambda: model.run_with_cache(inputs),
            BRIDGE: lambda: bridge.run_with_cache(inputs.input_ids),
        },
        "≤ 1.15×",
        ROUNDS,
    )
