"""Decoders in 8 and 4 bits compute with, and show, the weights that bitsandbytes dequantises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from hones_lens import HookedVLM, checkpoint_path, load_examples, load_task, localize_heads
from hones_lens.app.runs.identity import weights_hash
from hones_lens.model.nn.placed import PlacedLinear, weights_of

pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BITS: dict[str, dict[str, Any]] = {
    "8": {"load_in_8bit": True},
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4, scales too": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
}
CASES = [
    ("tiny-llava", "8"),
    ("tiny-llava", "4"),
    ("tiny-qwen2.5-vl", "8"),
    ("tiny-qwen2.5-vl", "4, scales too"),
]


def quantised(name: str, bits: str) -> Any:
    settings = BitsAndBytesConfig(**BITS[bits])
    folder = checkpoint_path(name)
    auto: Any = AutoModelForImageTextToText
    return auto.from_pretrained(folder, quantization_config=settings, device_map="cpu", dtype=torch.float32)


@torch.no_grad()
def effective(layer: nn.Linear) -> torch.Tensor:
    """The weights [out in] that a layer's own kernel computes with: what it makes of unit vectors."""
    out = layer(torch.eye(layer.in_features))
    return (out if layer.bias is None else out - layer.bias).T


@pytest.fixture(params=CASES, ids=" ".join)
def pair(request: pytest.FixtureRequest) -> tuple[Any, HookedVLM, HookedVLM]:
    """Hugging Face's quantised model, the same hooked, and the original, in evaluation mode."""
    name, bits = request.param
    plain = HookedVLM.from_pretrained(name)
    hf = quantised(name, bits).eval()
    return hf, HookedVLM.from_hf(hf, plain.processor), plain


@torch.no_grad()
def test_weights_passes_and_stages_are_those_of_the_dequantised_model(
    pair: tuple[Any, HookedVLM, HookedVLM],
) -> None:
    hf, model, plain = pair
    assert isinstance(model.blocks[0].attn.q, PlacedLinear) and model.cfg.dtype == torch.float32
    before = weights_hash(model)
    examples = load_examples("shapes", "vqa", "test", limit=2)
    inputs = model.prepare([e.image for e in examples], load_task("vqa").prompts(examples[0]) * 2)
    logits = model(inputs)
    for layer, block in enumerate(model.blocks):  # those of Hugging Face's now run
        theirs = hf.model.language_model.layers[layer]
        for ours, layer_of in ((block.attn.o, theirs.self_attn.o_proj), (block.mlp.up, theirs.mlp.up_proj)):
            rounds = 1e-4 if layer_of.weight.dtype == torch.int8 else 2e-3  # of the kernel
            torch.testing.assert_close(ours.weight, effective(layer_of), atol=rounds, rtol=rounds)
    assert torch.equal(model(inputs), logits) and weights_hash(model) == before
    assert not torch.equal(model.W_O, plain.W_O)
    weights = weights_of(model)
    for name, parameter in plain.named_parameters():
        parameter.copy_(weights[name])
    assert torch.equal(plain(inputs), logits)
    theirs = hf(**inputs.to_hf()).logits
    mask = inputs.attention_mask.bool()
    assert (theirs - logits)[mask].abs().max() <= 0.05 * logits[mask].abs().max()


def test_gradients_pass_through(pair: tuple[Any, HookedVLM, HookedVLM]) -> None:
    _, model, plain = pair
    weights = weights_of(model)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    found = []
    for each in (model, plain):
        inputs = each.prepare(
            load_examples("shapes", "vqa", "test", limit=1)[0].image, "what?", answers=["red"]
        )
        _, cache = each.run_with_cache(
            inputs, names_filter="blocks.0.mlp.hook_post", incl_bwd=True, return_type="loss"
        )
        found.append(cache["blocks.0.mlp.hook_post_grad"])
    assert torch.equal(*found) and bool(found[0].any())


def test_a_quantised_folder_loads_and_is_neither_edited_nor_saved(tmp_path: Path) -> None:
    hf = quantised("tiny-llava", "4")
    hf.save_pretrained(tmp_path / "quantised")
    original = HookedVLM.from_pretrained("tiny-llava")
    original.processor.save_pretrained(tmp_path / "quantised")
    model = HookedVLM.from_pretrained(str(tmp_path / "quantised"), "cpu")
    assert torch.equal(model.W_O, HookedVLM.from_hf(hf).W_O)
    with pytest.raises(ValueError, match="an edit would be lost"):
        model.blocks[0].mlp.W_out[3] = 0
    with pytest.raises(ValueError, match="quantised weights, which are read and not written"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    examples = load_examples("shapes", "vqa", "discovery", limit=2)
    heads = localize_heads(model, load_task("vqa"), examples, top_k=2, layers=[1], progress=False)
    for name, weight in weights_of(model).items():
        original.get_parameter(name).data.copy_(weight)
    expected = localize_heads(original, load_task("vqa"), examples, top_k=2, layers=[1], progress=False)
    torch.testing.assert_close(heads.drops, expected.drops, atol=0, rtol=0, equal_nan=True)


@torch.no_grad()
def test_weights_that_a_pass_on_the_cpu_has_laid_out_anew_are_refused_by_name() -> None:
    hf = quantised("tiny-llava", "4").eval()
    layer = hf.model.language_model.layers[1].mlp.down_proj
    effective(layer)
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no instructions for which bitsandbytes does so")
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj were laid out anew .* hook it before it runs"
    ):
        HookedVLM.from_hf(hf)
