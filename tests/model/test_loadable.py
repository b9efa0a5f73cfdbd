"""What can't be hooked is refused by name: wrappers, adapters, quantised, offloaded or absent weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_llava, random_qwen
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from hones_lens import HookedVLM
from hones_lens.model.families import load_family
from hones_lens.model.loading import load_hf_model, resolve

FAMILIES = {"llava": random_llava, "qwen": random_qwen}


def small() -> nn.Module:
    return random_llava.make_hf(random_llava.make_config())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_passes_also_after_a_pass_of_its_own(family: str) -> None:
    hf, model = FAMILIES[family].make_pair()
    inputs = FAMILIES[family].mixed_batch(model)
    hf(**inputs.to_hf())
    again = HookedVLM.from_hf(hf, model.processor)
    torch.testing.assert_close(again(inputs), model(inputs))


class Wrapped(nn.Module):
    """As PEFT's PeftModel: the model is inside."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base_model, self.peft_config, self.config = model, {"default": None}, model.config


WRAPPERS = {
    r"compiled .*model\._orig_mod": lambda model: torch.compile(model, backend="eager"),
    r"inside DataParallel: .*model\.module": nn.DataParallel,
    r"inside PEFT's Wrapped: .*merge_and_unload\(\)": Wrapped,
    r"transformers is needed, not dict": lambda model: model.state_dict() and {},
    r"LlavaModel has no unembedding": lambda model: model.model,
}


@pytest.mark.parametrize("message", WRAPPERS)
def test_wrappers_are_refused_and_say_how_to_get_the_model_out(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        HookedVLM.from_hf(WRAPPERS[message](small()))


def test_the_model_inside_a_compiled_one_is_taken() -> None:
    hf, model = random_llava.make_pair()
    inputs = random_llava.mixed_batch(model)
    inner = HookedVLM.from_hf(torch.compile(hf, backend="eager")._orig_mod)
    torch.testing.assert_close(inner(inputs), model(inputs))


def test_a_model_of_text_alone_lists_the_families() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"unknown model family .llama.; valid: .*llava.*, qwen2_5_vl"):
        HookedVLM.from_hf(LlamaForCausalLM(config))


@pytest.mark.parametrize("part", ["lora_A", "base_layer"])
def test_adapters_in_the_layers_are_refused(part: str) -> None:
    hf = small()
    setattr(hf.model.language_model.layers[1].self_attn.q_proj, part, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=rf"adapters in its layers \(.*layers\.1\.self_attn\.q_proj\.{part}"):
        HookedVLM.from_hf(hf)


def test_weights_of_two_dtypes_are_named() -> None:
    hf = small()
    hf.model.language_model.norm.to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"more than one dtype \(torch\.float32: .*; torch\.bfloat16: .*norm\.weight"
    ):
        HookedVLM.from_hf(hf)


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hones_lens.model.quantised.find_spec", lambda name: None)


@pytest.mark.usefixtures("no_bitsandbytes")
@pytest.mark.parametrize("attribute", ["is_quantized", "hf_quantizer"])
def test_quantised_models_in_memory_are_refused(attribute: str) -> None:
    hf = small()
    setattr(hf, attribute, True)
    hf.config.quantization_config = SimpleNamespace(to_dict=lambda: {"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"quantised weights \(bitsandbytes\).*, or install bitsandbytes$"):
        HookedVLM.from_hf(hf)


def test_weights_of_packed_integers_are_refused() -> None:
    packed = small()
    linear = packed.model.language_model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight\) has quantised weights"):
        HookedVLM.from_hf(packed)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_the_user_is_not_dropped_in_silence(register: str) -> None:
    hf = small()
    handle = getattr(hf.model.language_model.layers[2], register)(lambda *args: None)
    with pytest.raises(ValueError, match=r"hook of yours at model\.language_model\.layers\.2"):
        HookedVLM.from_hf(hf)
    handle.remove()
    HookedVLM.from_hf(hf)


def test_a_replaced_forward_is_not_dropped_in_silence() -> None:
    hf = small()
    mlp = hf.model.language_model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of model\.language_model\.layers\.1\.mlp is replaced"):
        HookedVLM.from_hf(hf)


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path)
    return tmp_path


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.usefixtures("no_bitsandbytes")
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("part", ["", "text_config", "vision_config"])
def test_quantised_folders_are_refused_before_their_library_is_asked_for(
    folder: Path, method: str, part: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (config[part] if part else config)["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"has quantised weights \({method}\).*original checkpoint"):
        HookedVLM.from_pretrained(str(folder))


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_file_of_an_old_quantisation_tool_is_enough(folder: Path, name: str) -> None:
    (folder / name).write_text('{"bits": 4}')
    with pytest.raises(ValueError, match=rf"it has {name}\) has quantised weights"):
        HookedVLM.from_pretrained(str(folder))


def test_an_adapter_s_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match=r"holds an adapter \(LoRA\), not a model: .*merge_and_unload"):
        HookedVLM.from_pretrained(str(tmp_path))


def test_shards_that_are_not_there_are_counted_and_named(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    expected = rf"index\.json: 1 of {len(shards)} files of weights are not there: {shards[1].name}"
    with pytest.raises(ValueError, match=expected):
        HookedVLM.from_pretrained(str(tmp_path))


def test_a_config_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        HookedVLM.from_pretrained(str(folder))


@pytest.mark.wrong_types
@pytest.mark.parametrize("dtype", [torch.int8, "nonsense", 16])
def test_a_dtype_that_is_none_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match="floating-point dtype"):
        HookedVLM.from_pretrained("tiny-llava", dtype=dtype)


# -- revisions -----------------------------------------------------------------------------------------------


def test_a_revision_goes_to_the_hub_and_before_the_known_one() -> None:
    assert resolve("llava", "v2") == ("llava-hf/llava-1.5-7b-hf", "v2")
    assert resolve("someone/something", "abc123") == ("someone/something", "abc123")


def test_folders_and_shipped_models_have_no_revision(folder: Path) -> None:
    for name in ("tiny-llava", str(folder)):
        with pytest.raises(ValueError, match=f"'{name}' is a folder, which has no revision 'v2'"):
            HookedVLM.from_pretrained(name, revision="v2")


def test_the_revision_reaches_every_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, weights and processor; nothing can be downloaded, so the readers only note what is asked."""
    config = random_llava.make_config()
    asked = []

    def reader(part: str, value: object) -> Callable[..., object]:
        def from_pretrained(name: str, revision: str | None = None, **options: object) -> object:
            asked.append((part, name, revision))
            return value

        return from_pretrained

    for class_, value in (
        (AutoConfig, config),
        (AutoModelForImageTextToText, (random_llava.make_hf(config), {})),
        (load_family("llava").processor_class, None),
    ):
        monkeypatch.setattr(class_, "from_pretrained", reader(class_.__name__, value))
    load_hf_model("someone/something", revision="abc123")
    parts = ("AutoConfig", "AutoModelForImageTextToText", load_family("llava").processor_class.__name__)
    assert asked == [(part, "someone/something", "abc123") for part in parts]
