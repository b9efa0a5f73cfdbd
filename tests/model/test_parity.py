"""Our logits, tokens and layers against Hugging Face's, on random models of many shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import random_anyres, random_gemma, random_llava, random_qwen, random_smolvlm
from transformers import (
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    VipLlavaConfig,
)

from hones_lens import HookedVLM, VLMInputs

TOLERANCE = 2e-5  # of the largest logit
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "mha": {},
    "one kv head, projector without bias": {
        "text": {"num_key_value_heads": 1},
        "vision_feature_layer": -1,
        "multimodal_projector_bias": False,
    },
    "two kv heads, tied, class token kept": {
        "text": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "vision_feature_select_strategy": "full",
    },
    "odd sizes, head_dim set": {
        "text": {
            "hidden_size": 21,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "intermediate_size": 37,
            "vocab_size": 461,
        },
        "vision": {"hidden_size": 15, "num_attention_heads": 5, "intermediate_size": 19},
    },
    "head_dim set, two kv heads, linear rope": {
        "text": {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        },
        "vision_feature_layer": [0],
    },
    "llama3 rope, first hidden state": {
        "text": {"rope_parameters": LLAMA3},
        "vision_feature_layer": 1,
        "vision_feature_select_strategy": "full",
    },
    "yarn rope, list of layers": {
        "text": {"rope_parameters": YARN, "num_key_value_heads": 1},
        "vision_feature_layer": [-2, 0, 1],
    },
    "list of layers, class token kept, gelu": {
        "vision": {"hidden_act": "gelu"},
        "vision_feature_layer": [3, -3],
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "relu",
    },
    "tied, pixels over the last patch, one layer": {
        "text": {"tie_word_embeddings": True, "num_hidden_layers": 1, "hidden_act": "gelu"},
        "vision": {"image_size": 25, "patch_size": 6, "num_attention_heads": 1},
        "tie_word_embeddings": True,
    },
    "one image token, other eps and theta": {
        "text": {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        "vision": {"image_size": 8, "patch_size": 8, "layer_norm_eps": 0.1},
        "vision_feature_layer": -1,
    },
}


SIGLIP = {"model_type": "siglip_vision_model"}
# LLaVA with other parts; those of well-known checkpoints are named.
CONFIGS |= {
    "mistral, sliding, two kv heads (BakLLaVA)": {
        "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 11},
    },
    "mistral without a window, head_dim set": {
        "text": {"model_type": "mistral", "sliding_window": None, "head_dim": 10, "num_key_value_heads": 1},
    },
    "qwen2, siglip, all patches (llava-interleave-qwen)": {
        "text": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 2},
        "vision": SIGLIP,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
    },
    "qwen2, sliding in the top layer": {
        "text": {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    },
    "siglip without its first patch, pixels over the last": {
        "vision": {**SIGLIP, "image_size": 25, "patch_size": 6, "hidden_act": "gelu_pytorch_tanh"},
    },
    "llama with biases, dynamic rope, siglip, two layers": {
        "text": {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
        "vision": SIGLIP,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-2, 1],
    },
    "vip, five layers": {"vip": True, "vision_feature_layer": [-2, -1, 0, 1, 2]},
    "vip, one layer, two kv heads, other eps": {
        "vip": True,
        "vision_feature_layer": -2,
        "projector_layernorm_eps": 0.1,
        "text": {"num_key_value_heads": 2},
    },
    "vip, mistral, siglip": {
        "vip": True,
        "vision_feature_layer": [-2, 1],
        "text": {"model_type": "mistral", "sliding_window": 9},
        "vision": SIGLIP,
    },
    "vip, tied, head_dim set": {
        "vip": True,
        "vision_feature_layer": [1, 2],
        "text": {"head_dim": 10, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
    },
}


QWEN_CONFIGS = {
    "qwen, two kv heads": {},
    "qwen, one kv head, windows that do not divide the grid": {
        "text": {"num_key_value_heads": 1},
        "vision": {"window_size": 3 * 14, "fullatt_block_indexes": [0]},
    },
    "qwen, mha, tied": {
        "text": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "tie_word_embeddings": True,
    },
    "qwen, odd sizes": {
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 37,
            "vocab_size": 701,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [3, 1, 1]},
        },
        "vision": {"hidden_size": 40, "num_heads": 5, "intermediate_size": 19, "patch_size": 6},
    },
    "qwen, no full attention, one patch of merging": {
        "vision": {"fullatt_block_indexes": [], "spatial_merge_size": 1, "window_size": 28},
    },
    "qwen, full attention alone, three patches merged": {
        "vision": {"fullatt_block_indexes": [0, 1, 2], "spatial_merge_size": 3, "window_size": 63},
    },
    "qwen, yarn, one layer each, gelu": {
        "text": {
            "num_hidden_layers": 1,
            "hidden_act": "gelu",
            "rope_parameters": {**YARN, "mrope_section": [2, 1, 1]},
        },
        "vision": {"depth": 1, "fullatt_block_indexes": [], "num_heads": 1, "hidden_act": "gelu"},
    },
    "qwen, windows of one token, other eps, tied": {
        "text": {"rms_norm_eps": 0.1, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "vision": {"window_size": 14, "temporal_patch_size": 1, "num_heads": 2},
        "tie_word_embeddings": True,
    },
    "qwen, one window over all": {"vision": {"window_size": 700, "fullatt_block_indexes": [2]}},
}


SMOLVLM_CONFIGS = {
    "smolvlm, tiles, tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "smolvlm, no tiles, mha, one layer each, gelu, sixteen patches a token": {
        "tiles": 1,
        "scale_factor": 4,
        "text": {"num_key_value_heads": 4, "num_hidden_layers": 1},
        "vision": {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "gelu"},
    },
    "idefics3, tiles, one kv head, pixels that fill no patch, odd sizes": {
        "kind": "idefics3",
        "scale_factor": 3,
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 37,
        },
        "vision": {"image_size": 44, "hidden_size": 15, "num_attention_heads": 5},
    },
    "idefics3, three tiles a side, llama3 rope, biases, no merging": {
        "kind": "idefics3",
        "tiles": 3,
        "scale_factor": 1,
        "text": {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
        "vision": {"image_size": 14},
    },
    "smolvlm, positions whose buckets fall together, other eps": {
        "tiles": 1,
        "scale_factor": 7,
        "text": {"rms_norm_eps": 0.1},
        "vision": {"image_size": 98, "patch_size": 2, "layer_norm_eps": 0.1},
    },
    "smolvlm, three tiles a side, yarn, one head of the tower": {
        "tiles": 3,
        "text": {"rope_parameters": YARN, "num_key_value_heads": 1},
        "vision": {"num_attention_heads": 1, "num_hidden_layers": 3},
    },
    "idefics3, no tiles, tied, mha, gelu": {
        "kind": "idefics3",
        "tiles": 1,
        "text": {"num_key_value_heads": 4, "tie_word_embeddings": True, "hidden_act": "gelu"},
        "tie_word_embeddings": True,
    },
    "idefics3, tiles, linear rope, one layer, sixteen patches a token": {
        "kind": "idefics3",
        "scale_factor": 4,
        "text": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
            "num_hidden_layers": 1,
            "rms_norm_eps": 0.1,
        },
        "vision": {"num_hidden_layers": 1},
    },
}
QWEN2_CONFIGS = {
    "qwen2-vl, two kv heads": {},
    "qwen2-vl, mha, tied, odd sizes": {
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 37,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [3, 1, 1]},
        },
        "vision": {"embed_dim": 40, "num_heads": 5, "mlp_ratio": 3, "patch_size": 6},
        "tie_word_embeddings": True,
    },
    "qwen2-vl, three patches merged, one layer, gelu": {
        "text": {"num_hidden_layers": 1, "hidden_act": "gelu", "num_key_value_heads": 1},
        "vision": {"depth": 1, "spatial_merge_size": 3, "hidden_act": "gelu", "num_heads": 1},
    },
    "qwen2-vl, yarn, one patch of merging": {
        "text": {"rope_parameters": {**YARN, "mrope_section": [2, 1, 1]}},
        "vision": {"spatial_merge_size": 1, "temporal_patch_size": 1},
    },
}
GEMMA_CONFIGS = {
    "gemma3, two kv heads": {},
    "gemma3, one kv head, odd sizes, no head scale, sixteen patches a token, pixels that fill no patch": {
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "intermediate_size": 37,
            "query_pre_attn_scalar": 10,
            "sliding_window": 7,
        },
        "vision": {"image_size": 59, "hidden_size": 15, "num_attention_heads": 5},
    },
    "gemma3, mha, global layers alone, default rope, no pooling": {
        "text": {
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
            "hidden_activation": "gelu",
        },
        "mm_tokens_per_image": 16,
    },
    "gemma3, sliding layers alone, a window smaller than a picture, other eps": {
        "text": {
            "layer_types": ["sliding_attention"] * 3,
            "sliding_window": 3,
            "rms_norm_eps": 0.1,
            "num_key_value_heads": 4,
        },
        "vision": {"layer_norm_eps": 0.1, "num_hidden_layers": 1, "hidden_act": "gelu"},
        "mm_tokens_per_image": 16,
    },
    "gemma3, head not tied, one token a picture": {
        "text": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "mm_tokens_per_image": 1,
    },
}
NEXT_CONFIGS = {
    "next, clip, mistral, sliding (llava-v1.6-mistral)": {
        "text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 31},
    },
    "next, larger tiles, mha, one layer, pixels over the last patch": {
        "text": {"num_hidden_layers": 1},
        "vision": {"image_size": 30, "num_attention_heads": 1},
        "multimodal_projector_bias": False,
    },
    "next, siglip, qwen2, tied, three layers, two resolutions": {
        "text": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
        "vision": {**random_anyres.SIGLIP, "image_size": 28},
        "vision_feature_layer": [-1, 0, 1],
        "image_grid_pinpoints": [[28, 28], [56, 84]],
        "tie_word_embeddings": True,
    },
    "next, one patch a tile, odd sizes, biases": {
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 37,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "vision": {"image_size": 8, "patch_size": 8, "hidden_size": 15, "num_attention_heads": 5},
        "image_grid_pinpoints": [[24, 32], [40, 16], [16, 56]],
    },
}
ONEVISION = {"kind": "llava_onevision"}
NEXT_CONFIGS |= {
    "onevision, tied, pooled (llava-onevision-qwen2-0.5b)": {
        **ONEVISION,
        "text": {"num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
    },
    "onevision, many tiles, one layer, one kv head, pixels over the last patch": {
        **ONEVISION,
        "text": {"num_hidden_layers": 1, "num_key_value_heads": 1},
        "vision": {"image_size": 15, "num_hidden_layers": 1},
        "image_grid_pinpoints": [[15, 15], [60, 75], [105, 45], [45, 120]],
        "vision_aspect_ratio": "anyres_max_3",
    },
    "onevision, llama, clip, three layers, nothing pooled": {
        **ONEVISION,
        "text": {"model_type": "llama"},
        "vision": {"model_type": "clip_vision_model"},
        "vision_feature_layer": [-1, 0, 1],
        "vision_aspect_ratio": "anyres_max_9",
    },
    "onevision, ratio close to where pooling begins, no biases, odd sizes": {
        **ONEVISION,
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 37,
        },
        "vision": {"image_size": 24, "patch_size": 8, "hidden_size": 15, "num_attention_heads": 5},
        "image_grid_pinpoints": [[24, 48], [48, 48], [72, 24]],
        "vision_aspect_ratio": "anyres_max_2",
        "multimodal_projector_bias": False,
    },
}
QWEN3_CONFIGS = {
    "qwen3-vl, two kv heads, deepstack in two layers": {},
    "qwen3-vl, mha, tied, odd sizes, wide heads, biases, positions that fill no square": {
        "text": {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "intermediate_size": 37,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 2, 2]},
        },
        "vision": {
            "hidden_size": 40,
            "num_heads": 5,
            "patch_size": 6,
            "num_position_embeddings": 11,
            "deepstack_visual_indexes": [2],
        },
        "tie_word_embeddings": True,
    },
    "qwen3-vl, three patches merged, one layer each, gelu, other eps": {
        "text": {"num_hidden_layers": 1, "hidden_act": "gelu", "num_key_value_heads": 1, "rms_norm_eps": 0.1},
        "vision": {
            "depth": 1,
            "spatial_merge_size": 3,
            "hidden_act": "gelu",
            "num_heads": 1,
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen3-vl, yarn, one patch of merging, deepstack in every layer": {
        "text": {"rope_parameters": {**YARN, "mrope_section": [2, 1, 1]}},
        "vision": {"spatial_merge_size": 1, "temporal_patch_size": 1, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "qwen3-vl, no deepstack, more positions than patches": {
        "vision": {"deepstack_visual_indexes": [], "num_position_embeddings": 400},
    },
}
MADE = {
    LlavaNextConfig: random_anyres,
    LlavaOnevisionConfig: random_anyres,
    Gemma3Config: random_gemma,
    LlavaConfig: random_llava,
    VipLlavaConfig: random_llava,
    Qwen2_5_VLConfig: random_qwen,
    Qwen2VLConfig: random_qwen,
    Qwen3VLConfig: random_qwen,
    SmolVLMConfig: random_smolvlm,
    Idefics3Config: random_smolvlm,
}


FIRST = (
    "mistral, sliding",
    "qwen2, siglip",
    "vip, five",
    next(iter(SMOLVLM_CONFIGS)),
    "qwen2-vl, two",
    "gemma3, sliding",
    "next, clip",
    "onevision, tied",
    "qwen3-vl, two",
)
KNOWN = [*CONFIGS, *QWEN_CONFIGS, *SMOLVLM_CONFIGS, *QWEN2_CONFIGS, *GEMMA_CONFIGS, *NEXT_CONFIGS]
KNOWN += QWEN3_CONFIGS
SELDOM = [
    *list(CONFIGS)[10:],
    *SMOLVLM_CONFIGS,
    *QWEN2_CONFIGS,
    *GEMMA_CONFIGS,
    *NEXT_CONFIGS,
    *QWEN3_CONFIGS,
]  # not once more for each kind of kernels
PARAMS = [
    pytest.param(name, marks=pytest.mark.slow if name in SELDOM and not name.startswith(FIRST) else ())
    for name in KNOWN
]


class Case:
    """One random model, twice, and a left-padded batch for it."""

    def __init__(self, config: Any, seed: int):
        made = MADE[type(config)]
        self.hf, self.ours = made.make_pair(config, seed)
        self.inputs = made.mixed_batch(self.ours)

    def hf_logits(self, inputs: VLMInputs) -> torch.Tensor:
        self.hf.model.rope_deltas = None  # Hugging Face's Qwen keeps those of its last call
        with torch.no_grad():
            return self.hf(**inputs.to_hf()).logits

    def hf_tokens(self, inputs: VLMInputs, n: int) -> torch.Tensor:
        tokens = self.hf.generate(**inputs.to_hf(), max_new_tokens=n, do_sample=False)
        return tokens[:, inputs.input_ids.shape[1] :]


@pytest.fixture(scope="module", params=PARAMS)
def case(request: pytest.FixtureRequest) -> Case:
    names = KNOWN
    if request.param in CONFIGS:
        return Case(random_llava.make_config(**CONFIGS[request.param]), names.index(request.param))
    if request.param in SMOLVLM_CONFIGS:
        config = random_smolvlm.make_config(**SMOLVLM_CONFIGS[request.param])
        return Case(config, names.index(request.param))
    if request.param in NEXT_CONFIGS:
        config = random_anyres.make_config(**NEXT_CONFIGS[request.param])
        return Case(config, names.index(request.param))
    if request.param in QWEN2_CONFIGS:
        config = random_qwen.make_config(kind="qwen2_vl", **QWEN2_CONFIGS[request.param])
        return Case(config, names.index(request.param))
    if request.param in GEMMA_CONFIGS:
        config = random_gemma.make_config(**GEMMA_CONFIGS[request.param])
        return Case(config, names.index(request.param))
    if request.param in QWEN3_CONFIGS:
        config = random_qwen.make_config(kind="qwen3_vl", **QWEN3_CONFIGS[request.param])
        return Case(config, names.index(request.param))
    # Other seeds than above: at one of those two tokens of the odd sizes are equally likely.
    return Case(random_qwen.make_config(**QWEN_CONFIGS[request.param]), 20 + names.index(request.param))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_batch_is_the_hard_one(case: Case) -> None:
    shown = [
        [case.inputs.layout(row, i).picture for i in range(len(g))] for row, g in enumerate(case.inputs.grids)
    ]
    pictures = [[i if at is None else at for i, at in enumerate(row)] for row in shown]
    assert [sorted(set(row)) for row in pictures] == [[0], [0, 1], []]
    assert case.inputs.attention_mask[:, 0].sum() < 3, "no row is padded"


def test_logits(case: Case) -> None:
    logits = case.ours(case.inputs)
    assert logits.shape == (*case.inputs.input_ids.shape, case.ours.cfg.d_vocab)
    assert random_llava.relative_difference(logits, case.hf_logits(case.inputs), case.inputs) <= TOLERANCE


def test_logits_of_text_alone(case: Case) -> None:
    inputs = case.ours.prepare(None, list(random_llava.QUESTIONS))
    assert inputs.pixel_values is None
    expected = case.hf_logits(inputs)
    assert random_llava.relative_difference(case.ours(inputs), expected, inputs) <= TOLERANCE
    row = inputs.input_ids[1][inputs.attention_mask[1].bool()]
    bare = case.ours.as_inputs(row)
    assert random_llava.relative_difference(case.ours(row), expected[1:2, -len(row) :], bare) <= TOLERANCE


def test_padding_changes_nothing(case: Case) -> None:
    logits = case.ours(case.inputs)
    for row in range(3):
        n = int(case.inputs.attention_mask[row].sum())
        alone = case.inputs[row]
        mapping = {"input_ids": alone.input_ids[:, -n:], "pixel_values": alone.pixel_values}
        mapping |= {"image_grid_thw": alone.image_grid_thw, "image_sizes": alone.image_sizes}
        mapping["batch_num_images"] = alone.batch_num_images
        if alone.token_type_ids is not None:
            mapping["token_type_ids"] = alone.token_type_ids[:, -n:]
        difference = (case.ours(mapping)[0] - logits[row, -n:]).abs().max()
        assert difference <= TOLERANCE * max(1.0, logits[row, -n:].abs().max())


def test_greedy_tokens(case: Case) -> None:
    expected = case.hf_tokens(case.inputs, 8)
    for use_kv_cache in (True, False):
        found = case.ours.generate(case.inputs, 8, "tokens", use_kv_cache=use_kv_cache)
        assert found.dtype == torch.long
        assert torch.equal(found, expected)


def test_start_at_every_layer(case: Case) -> None:
    n = case.ours.cfg.n_layers
    full, cache = case.ours.run_with_cache(
        case.inputs, names_filter=lambda name: name.endswith("hook_resid_pre")
    )
    for layer in range(n):
        resid = cache[f"blocks.{layer}.hook_resid_pre"]
        assert torch.equal(case.ours(resid, start_at_layer=layer, inputs=case.inputs), full)
        assert torch.equal(case.ours(resid, start_at_layer=layer - n, inputs=case.inputs.to_hf()), full)
        assert torch.equal(case.ours(case.inputs, stop_at_layer=layer), resid)
        for above in range(layer, n):
            between = case.ours(resid, start_at_layer=layer, stop_at_layer=above, inputs=case.inputs)
            assert torch.equal(between, cache[f"blocks.{above}.hook_resid_pre"])
    last = case.ours(case.inputs, stop_at_layer=n)
    assert torch.equal(case.ours(last, start_at_layer=n, inputs=case.inputs), full)


def test_logits_to_keep(case: Case) -> None:
    full = case.ours(case.inputs)
    widths = []
    handle = case.ours.unembed.register_forward_hook(
        lambda module, args, out: widths.append(args[0].shape[1])
    )
    try:
        last = case.ours(case.inputs, logits_to_keep=2)
        some = case.ours(case.inputs, logits_to_keep=torch.tensor([3, 0, -1]))
    finally:
        handle.remove()
    assert widths == [2, 3], "the unembedding is computed where nobody asked"
    torch.testing.assert_close(last, full[:, -2:], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(some, full[:, [3, 0, -1]], atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def plain() -> Case:
    return Case(random_llava.make_config(), 3)


def test_what_the_hf_processor_returns(plain: Case) -> None:
    one, two, three = random_llava.make_images(3)
    texts = [
        f"USER: {image}{question} ASSISTANT:"
        for image, question in zip(
            ("<image>\n", "<image>\n<image>\n", ""), random_llava.QUESTIONS, strict=True
        )
    ]
    mapping = plain.ours.processor(images=[one, two, three], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(mapping["input_ids"], plain.inputs.input_ids)
    assert torch.equal(mapping["pixel_values"], plain.inputs.pixel_values)
    assert torch.equal(plain.ours(mapping), plain.ours(plain.inputs))
    assert torch.equal(
        plain.ours.generate(mapping, 3, "tokens"), plain.ours.generate(plain.inputs, 3, "tokens")
    )


def test_first_hidden_state_named_by_a_bare_zero() -> None:
    """Hugging Face's own forward takes [0] alone; the hooked model reads 0 as the same."""
    case = Case(random_llava.make_config(vision_feature_layer=[0]), 4)
    case.hf.config.vision_feature_layer = 0
    found = HookedVLM.from_hf(case.hf, case.ours.processor)(case.inputs)
    assert torch.equal(found, case.ours(case.inputs))


def test_layers_below_start_and_above_stop_do_not_run(plain: Case) -> None:
    resid = plain.ours(plain.inputs, stop_at_layer=1)
    ran: Counter[str] = Counter()
    modules = {f"block {i}": block for i, block in enumerate(plain.ours.blocks)}
    modules |= {"vision": plain.ours.vision_encoder, "embed": plain.ours.embed, "unembed": plain.ours.unembed}
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.update([name]))
        for name, module in modules.items()
    ]
    try:
        plain.ours(resid, start_at_layer=1, inputs=plain.inputs)
        assert ran == {"block 1": 1, "block 2": 1, "unembed": 1}
        ran.clear()
        plain.ours(plain.inputs, stop_at_layer=1)
        assert ran == {"vision": 1, "embed": 1, "block 0": 1}
        ran.clear()
        plain.ours(resid, start_at_layer=1, stop_at_layer=-1, inputs=plain.inputs)
        assert ran == {"block 1": 1}
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("layer", [-4, 4])
def test_layer_out_of_range(plain: Case, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer} is not in 0 … 3"):
        plain.ours(plain.inputs, stop_at_layer=layer)


def test_residual_needs_inputs_that_fit(plain: Case) -> None:
    resid = plain.ours(plain.inputs, stop_at_layer=1)
    with pytest.raises(ValueError, match=r"start_at_layer takes a residual stream .* and inputs="):
        plain.ours(resid, start_at_layer=1)
    with pytest.raises(ValueError, match="start_at_layer takes a residual stream"):
        plain.ours(plain.inputs, start_at_layer=1, inputs=plain.inputs)
    with pytest.raises(ValueError, match=r"residual \(3, 50, 32\) does not fit inputs \(3, 51\)"):
        plain.ours(resid[:, 1:], start_at_layer=1, inputs=plain.inputs)


@pytest.mark.parametrize("where", ["config", "generation config", "generation config without padding"])
def test_padding_after_one_of_several_eos_tokens(where: str) -> None:
    free = Case(random_llava.make_config(text={"eos_token_id": None}), 5)
    said = free.hf_tokens(free.inputs, 8)
    # Rows 0 and 1 end on the way, at tokens that no other row says; row 2 goes on.
    places = [next(i for i in range(2, 8) if (said == said[row, i]).sum() == 1) for row in (0, 1)]
    ends = [int(said[0, places[0]]), int(said[1, places[1]])]
    if where == "config":
        ended = Case(random_llava.make_config(text={"eos_token_id": ends}), 5)
    else:
        ended = free
        ended.hf.generation_config.eos_token_id = ends
        ended.hf.generation_config.pad_token_id = 7 if where == "generation config" else None
        ended.ours = HookedVLM.from_hf(ended.hf, ended.ours.processor)
    expected = ended.hf_tokens(ended.inputs, 8)
    pad = {"config": ended.hf.config.text_config.pad_token_id, "generation config": 7}.get(where, ends[0])
    assert max(places) < 7, "no row is padded behind its end"
    for row, place in enumerate(places):
        assert torch.equal(expected[row, : place + 1], said[row, : place + 1])
        assert (expected[row, place + 1 :] == pad).all()
    assert torch.equal(expected[2], said[2])
    for use_kv_cache in (True, False):
        assert torch.equal(ended.ours.generate(ended.inputs, 8, "tokens", use_kv_cache), expected)


def test_generation_stops_when_every_row_has_ended() -> None:
    case = Case(random_llava.make_config(), 5)
    said = case.hf_tokens(case.inputs[[0, 1]], 6)
    case.hf.generation_config.eos_token_id = [int(said[0, 1]), int(said[1, 0])]
    ours = HookedVLM.from_hf(case.hf, case.ours.processor)
    found = ours.generate(case.inputs[[0, 1]], 6, "tokens")
    assert torch.equal(found, case.hf_tokens(case.inputs[[0, 1]], 6))
    assert found.shape == (2, 2)


def test_generation_without_any_eos_token() -> None:
    case = Case(random_llava.make_config(text={"eos_token_id": None}), 5)
    found = case.ours.generate(case.inputs, 5, "tokens")
    assert torch.equal(found, case.hf_tokens(case.inputs, 5))


def test_generated_text(plain: Case) -> None:
    tokens = plain.hf_tokens(plain.inputs, 5)
    decoded = plain.ours.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert plain.ours.generate(plain.inputs, 5) == [text.strip() for text in decoded]


def test_loss(plain: Case) -> None:
    answered = random_llava.mixed_batch(plain.ours, ["red", "two large circles", "no"])
    labels = answered.input_ids.masked_fill(~answered.answer_mask, -100)
    expected = plain.hf(**answered.to_hf(), labels=labels).loss
    torch.testing.assert_close(plain.ours(answered, return_type="loss"), expected)


def test_loss_without_an_answer_is_over_the_text(plain: Case) -> None:
    inputs = plain.inputs
    first = inputs.attention_mask.cumsum(-1) == 1
    labels = inputs.input_ids.masked_fill(~inputs.attention_mask.bool() | inputs.image_mask | first, -100)
    expected = plain.hf(**inputs.to_hf(), labels=labels).loss
    torch.testing.assert_close(plain.ours(inputs, return_type="loss"), expected)


def test_double_precision_finds_the_same(plain: Case) -> None:
    hf, ours = random_llava.make_pair(random_llava.make_config(), 3)
    hf.double()
    ours.double()
    inputs = plain.inputs.to(dtype=torch.float64)
    assert random_llava.largest_difference(ours(inputs), hf(**inputs.to_hf()).logits, inputs) <= 1e-5
    assert ours.cfg.dtype == torch.float64


def test_lower_precision_does_not_blur_the_positions() -> None:
    ours = random_llava.make_pair()[1]
    positions = torch.arange(400)[None]
    cos, sin = ours.rotary(positions, torch.float32)
    ours.to(torch.bfloat16)
    assert ours.cfg.dtype == torch.bfloat16
    for before, after in zip((cos, sin), ours.rotary(positions, torch.float32), strict=True):
        assert torch.equal(before, after)
