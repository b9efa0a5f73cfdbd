"""Loading: what is refused, what is shared, and what must stay as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_llava
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, PixtralVisionConfig

from hones_lens import HookedVLM, checkpoint_path
from hones_lens.model.config import find_settings
from hones_lens.model.families.llava import HookedLlava
from hones_lens.model.loading import resolve


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# -- config values that are refused --------------------------------------------------------------


def setter(part: str, values: dict[str, Any]) -> Callable:
    def set_values(config: LlavaConfig) -> None:
        for key, value in values.items():  # past the class's own checks: ours must not rely on them
            object.__setattr__(getattr(config, part) if part else config, key, value)

    return set_values


def set_text(**values: Any) -> Callable:
    return setter("text_config", values)


def set_vision(**values: Any) -> Callable:
    return setter("vision_config", values)


def set_top(**values: Any) -> Callable:
    return setter("", values)


def rope(kind: str, **values: Any) -> Callable:
    return set_text(rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **values})


REFUSED = {
    r"text_config\.pretraining_tp=2": set_text(pretraining_tp=2),
    r"text_config\.hidden_act='nonsense'": set_text(hidden_act="nonsense"),
    r"text_config\.sliding_window=128": set_text(sliding_window=128),
    r"text_config\.attention_dropout=0\.1": set_text(attention_dropout=0.1),
    r"rope_type='longrope'": rope("longrope", short_factor=[1.0], long_factor=[1.0]),
    r"rope_type='nonsense'": rope("nonsense"),
    r"vision_config\.hidden_act='nonsense'": set_vision(hidden_act="nonsense"),
    r"vision_config\.num_channels=1": set_vision(num_channels=1),
    r"vision_config\.image_size=\(28, 35\)": set_vision(image_size=(28, 35)),
    r"config\.quantization_config=\{'bits': 4\}": set_top(quantization_config={"bits": 4}),
    r"config\.projector_hidden_act='nonsense'": set_top(projector_hidden_act="nonsense"),
    r"config\.vision_feature_select_strategy='cls'": set_top(vision_feature_select_strategy="cls"),
    r"config\.vision_feature_layer=4 is outside the 4 hidden states": set_top(vision_feature_layer=4),
    r"config\.vision_feature_layer=-5 is outside": set_top(vision_feature_layer=[-1, -5]),
    r"config\.vision_feature_layer=\[\]": set_top(vision_feature_layer=[]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_config_values_name_themselves(message: str) -> None:
    config = random_llava.make_config()
    REFUSED[message](config)
    with pytest.raises(ValueError, match=message):
        HookedLlava.from_config(config, "tiny", torch.device("cpu"), torch.float32)


def test_other_towers_and_decoders_are_refused() -> None:
    config = random_llava.make_config()
    config.text_config = PhiConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(
        ValueError,
        match=r"text_config\.model_type='phi' is not handled; handled: 'llama', 'mistral', 'qwen2'",
    ):
        HookedLlava.from_config(config, "tiny", torch.device("cpu"), torch.float32)
    config = random_llava.make_config()
    config.vision_config = PixtralVisionConfig(hidden_size=24, num_attention_heads=3, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"vision_config\.model_type='pixtral' is not handled"):
        HookedLlava.from_config(config, "tiny", torch.device("cpu"), torch.float32)


def test_an_in_memory_model_with_a_value_that_hf_ignores_is_refused() -> None:
    """Mistral's attention has no biases, whatever its config says."""
    text = {"model_type": "mistral", "attention_bias": True}
    with pytest.raises(ValueError, match=r"text_config\.attention_bias=True is not handled"):
        HookedVLM.from_hf(random_llava.make_hf(random_llava.make_config(text=text)))
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide the 4 heads"):
        HookedVLM.from_hf(random_llava.make_hf(random_llava.make_config(text={"num_key_value_heads": 3})))


def test_dynamic_rope_is_refused_beyond_its_limit() -> None:
    """Up to there its angles are the plain ones; behind, they depend on the length of the sequence."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    _, model = random_llava.make_pair(random_llava.make_config(text={"rope_parameters": rope}))
    inputs = model.prepare(None, "is it red?")
    places = torch.arange(inputs.input_ids.shape[1])[None]
    model({**inputs.to_hf(), "position_ids": places + 512 - places.shape[1]})
    with pytest.raises(ValueError, match="position 512 is beyond the 512 of the checkpoint"):
        model({**inputs.to_hf(), "position_ids": places + 513 - places.shape[1]})


# -- checkpoints ---------------------------------------------------------------------------------


class Saved:
    """A model saved by Hugging Face, in one file and in shards."""

    def __init__(self, folder: Path):
        self.hf = random_llava.make_hf(random_llava.make_config(text={"num_key_value_heads": 2}), seed=31)
        processor = random_llava.processor_for(self.hf.config)
        self.whole, self.shards = folder / "whole", folder / "shards"
        self.hf.save_pretrained(self.whole)
        self.hf.save_pretrained(self.shards, max_shard_size="50KB")
        for place in (self.whole, self.shards):
            processor.save_pretrained(place)

    def changed(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
        """A copy of the checkpoint whose weights were changed."""
        for file in self.whole.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(self.whole / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("saved"))


def same_as(hf: LlavaForConditionalGeneration, model: HookedVLM, tolerance: float = 5e-5) -> None:
    inputs = random_llava.mixed_batch(model)
    expected = hf(**inputs.to_hf()).logits
    assert random_llava.largest_difference(model(inputs), expected, inputs) <= tolerance


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_a_folder_saved_by_hugging_face(saved: Saved, kind: str) -> None:
    folder = getattr(saved, kind)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert (len(files) > 1) == (kind == "shards")
    keys = [key for name in files for key in load_file(folder / name)]
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in keys, "no longer the old hub layout"
    model = HookedVLM.from_pretrained(str(folder))
    same_as(saved.hf, model)
    assert model.cfg.model_name == str(folder)
    assert (model.cfg.dtype, model.cfg.device) == (torch.float32, torch.device("cpu"))
    assert not model.training
    assert model.tokenizer.image_token == "<image>"


@pytest.mark.parametrize("layout", ["of the hub's LLaVA-1.5", "of the modules"])
def test_other_key_layouts(saved: Saved, tmp_path: Path, layout: str) -> None:
    def renamed(weights: dict[str, Tensor]) -> None:
        weights.clear()
        for name, value in saved.hf.state_dict().items():
            if layout == "of the hub's LLaVA-1.5":
                name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
                name = name.replace("language_model.", "language_model.model.")
                name = name.replace("lm_head.", "language_model.lm_head.")
            weights[name] = value.clone()

    same_as(saved.hf, HookedVLM.from_pretrained(str(saved.changed(tmp_path, renamed))))


def test_half_precision_is_widened_on_a_cpu(saved: Saved, tmp_path: Path) -> None:
    folder = str(saved.changed(tmp_path, lambda weights: None))
    random_llava.make_hf(saved.hf.config, seed=32).half().save_pretrained(folder)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    model = HookedVLM.from_pretrained(folder)
    assert model.cfg.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same_as(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), model)
    assert HookedVLM.from_pretrained(folder, dtype=torch.float16).cfg.dtype == torch.float16
    assert HookedVLM.from_pretrained(folder, device="cpu", dtype="bfloat16").cfg.dtype == torch.bfloat16


MISSING = [
    "language_model.model.layers.1.mlp.down_proj.weight",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
    "multi_modal_projector.linear_2.bias",
    "vision_tower.encoder.layers.0.self_attn.k_proj.bias",
    "vision_tower.encoder.layers.2.self_attn.k_proj.bias",
]


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_weight(saved: Saved, tmp_path: Path, name: str) -> None:
    folder = saved.changed(tmp_path, lambda weights: weights.pop(name))
    tail = name.split("model.", 1)[-1] if "lm_head" not in name else "lm_head.weight"
    with pytest.raises(ValueError, match=f"has missing keys: .*{tail}"):
        HookedVLM.from_pretrained(str(folder))


def test_an_extra_weight(saved: Saved, tmp_path: Path) -> None:
    def grown(weights: dict[str, Tensor]) -> None:
        weights["language_model.model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)

    with pytest.raises(ValueError, match=r"has unexpected keys: .*layers\.1\.self_attn\.q_proj\.bias"):
        HookedVLM.from_pretrained(str(saved.changed(tmp_path, grown)))


def test_a_weight_of_another_shape(saved: Saved, tmp_path: Path) -> None:
    def cut(weights: dict[str, Tensor]) -> None:
        name = "multi_modal_projector.linear_2.bias"
        weights[name] = weights[name][:-1].clone()

    with pytest.raises(ValueError, match=r"has mismatched keys: .*multi_modal_projector\.linear_2\.bias"):
        HookedVLM.from_pretrained(str(saved.changed(tmp_path, cut)))


def test_an_unsupported_value_in_a_checkpoint(saved: Saved, tmp_path: Path) -> None:
    folder = saved.changed(tmp_path, lambda weights: None)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["pretraining_tp"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pretraining_tp=2 is not handled"):
        HookedVLM.from_pretrained(str(folder))


# -- names ---------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known() -> None:
    for wrong in ("lava", "./nowhere/at/all", "/nowhere/at/all"):
        with pytest.raises(ValueError, match=f"unknown model '{wrong}': .*known: .*tiny-llava"):
            HookedVLM.from_pretrained(wrong)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not a checkpoint"):
        HookedVLM.from_pretrained(str(tmp_path))


def test_another_family_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
    with pytest.raises(ValueError, match=r"unknown model family 'mllama'; valid: .*llava"):
        HookedVLM.from_pretrained(str(tmp_path))


def test_the_shipped_model_by_its_name() -> None:
    model = HookedVLM.from_pretrained("tiny-llava")
    assert model.cfg.model_name == "tiny-llava"
    assert model.cfg.dtype == torch.float32
    hf = LlavaForConditionalGeneration.from_pretrained(checkpoint_path("tiny-llava"), dtype=torch.float32)
    same_as(hf, model, 5e-5)


def test_names_resolve() -> None:
    hub = ("llava-hf/llava-1.5-7b-hf", find_settings("llava").revision)
    assert resolve("llava") == resolve("llava-1.5-7b") == resolve("llava-hf/llava-1.5-7b-hf") == hub
    assert resolve("someone/something") == ("someone/something", None)


# -- shared, and unchanged -----------------------------------------------------------------------


def storages(module: nn.Module) -> dict[int, int]:
    """Address and bytes of every storage that holds a parameter."""
    actual = [p.untyped_storage() for p in module.parameters()]
    return {storage.data_ptr(): storage.nbytes() for storage in actual}


@pytest.mark.parametrize("tied", [False, True])
def test_there_is_no_second_copy_of_the_weights(tied: bool) -> None:
    hf, model = random_llava.make_pair(
        random_llava.make_config(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    )
    theirs, ours = storages(hf), storages(model)
    assert set(ours) <= set(theirs)
    assert sum((theirs | ours).values()) == sum(theirs.values())
    pairs = {
        "embed.weight": "model.language_model.embed_tokens.weight",
        "unembed.linear.weight": "lm_head.weight",
        "blocks.1.attn.k.weight": "model.language_model.layers.1.self_attn.k_proj.weight",
        "blocks.2.ln2.weight": "model.language_model.layers.2.post_attention_layernorm.weight",
        "vision_encoder.blocks.1.mlp.down.bias": "model.vision_tower.encoder.layers.1.mlp.fc2.bias",
        "vision_encoder.position_embedding": "model.vision_tower.embeddings.position_embedding.weight",
    }
    for mine, name in pairs.items():
        assert model.get_parameter(mine).data_ptr() == hf.get_parameter(name).data_ptr(), mine
    inputs = random_llava.mixed_batch(model)
    before = model(inputs)
    for parameter in hf.parameters():
        parameter.mul_(1.01)
    assert not torch.equal(model(inputs), before), "a change of the weights does not show"
    same_as(hf, model)


SAID = ["red", "two", "no"]


def module_hooks(module: nn.Module) -> list[list[int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [[id(hook) for kind in kinds for hook in getattr(m, kind).values()] for m in module.modules()]


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_handed_in_is_unchanged(tied: bool) -> None:
    hf = random_llava.make_hf(
        random_llava.make_config(text={"tie_word_embeddings": tied}, tie_word_embeddings=tied)
    )
    hf.train()
    for parameter in list(hf.parameters())[::2]:
        parameter.requires_grad_(False)
    inputs = random_llava.mixed_batch(
        HookedVLM.from_hf(random_llava.make_hf(hf.config), random_llava.processor_for(hf.config)), SAID
    )
    before = hf(**inputs.to_hf()).logits  # at its first pass Hugging Face sets hooks of its own
    weights = {name: value.clone() for name, value in hf.state_dict().items()}
    addresses = {name: value.data_ptr() for name, value in hf.state_dict().items()}
    flags = {name: p.requires_grad for name, p in hf.named_parameters()}
    identities = {name: id(p) for name, p in hf.named_parameters()}
    config = hf.config.to_dict()
    generation = hf.generation_config.to_dict()
    hooks = module_hooks(hf)

    model = HookedVLM.from_hf(hf, random_llava.processor_for(hf.config))
    with torch.enable_grad():
        model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
    model.generate(inputs, 2, "tokens")
    model.set_use_split_qkv_input(True)
    model.to(torch.float64)
    assert model(inputs).dtype == torch.float64

    assert hf.training and all(module.training for module in hf.modules())
    assert not model.training
    assert {name: p.requires_grad for name, p in hf.named_parameters()} == flags
    assert {name: id(p) for name, p in hf.named_parameters()} == identities
    assert all(p.grad is None for p in hf.parameters())
    for name, value in hf.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, weights[name]), name
        assert value.data_ptr() == addresses[name], name
    assert module_hooks(hf) == hooks
    assert hf.config.to_dict() == config
    assert hf.generation_config.to_dict() == generation
    assert torch.equal(hf(**inputs.to_hf()).logits, before)


def test_tied_weights_stay_tied() -> None:
    config = random_llava.make_config(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    model = random_llava.make_pair(config)[1]
    assert model.W_U.data_ptr() == model.W_E.data_ptr()
    model.to(torch.float64)
    assert model.W_U.data_ptr() == model.W_E.data_ptr(), "moving the model made a second copy"
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names and "unembed.linear.weight" not in names


def test_a_moved_model_computes_the_same() -> None:
    hf, model = random_llava.make_pair()
    inputs = random_llava.mixed_batch(model)
    before = model(inputs)
    moved = model.to(torch.float64)
    assert moved is model and model.cfg.dtype == torch.float64
    assert random_llava.largest_difference(model(inputs), before.double(), inputs) <= 5e-5
    assert storages(model).keys().isdisjoint(storages(hf))


def test_weight_views() -> None:
    hf, model = random_llava.make_pair(
        random_llava.make_config(text={"num_key_value_heads": 2, "head_dim": 10, "num_hidden_layers": 2})
    )
    theirs, ours = hf.model.language_model.layers[1], model.blocks[1]

    def check(view: Tensor, weight: Tensor, expected: Tensor) -> None:
        assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr(), "a copy, not a view"
        assert torch.equal(view, expected)

    for name, projection, heads in [("W_Q", "q_proj", 4), ("W_K", "k_proj", 2), ("W_V", "v_proj", 2)]:
        weight = theirs.self_attn.get_parameter(f"{projection}.weight")  # [heads * d_head, d_model]
        by_head = torch.stack([weight[10 * h : 10 * (h + 1)].T for h in range(heads)])
        check(getattr(ours.attn, name), weight, by_head)
        assert torch.equal(getattr(model, name)[1], by_head)
    weight = theirs.self_attn.o_proj.weight  # [d_model, heads * d_head]
    by_head = torch.stack([weight[:, 10 * h : 10 * (h + 1)].T for h in range(4)])
    check(ours.attn.W_O, weight, by_head)
    assert torch.equal(model.W_O[1], by_head)
    for name, projection in {"W_gate": "gate_proj", "W_in": "up_proj", "W_out": "down_proj"}.items():
        weight = theirs.mlp.get_parameter(f"{projection}.weight")
        check(getattr(ours.mlp, name), weight, weight.T)
        assert torch.equal(getattr(model, name)[1], weight.T)
    check(model.W_E, hf.get_input_embeddings().weight, hf.get_input_embeddings().weight)
    check(model.W_U, hf.lm_head.weight, hf.lm_head.weight.T)
    tower, block = hf.model.vision_tower.encoder.layers[0], model.vision_encoder.blocks[0]
    weight = tower.self_attn.v_proj.weight
    check(block.attn.W_V, weight, torch.stack([weight[8 * h : 8 * (h + 1)].T for h in range(3)]))
    check(block.mlp.W_out, tower.mlp.fc2.weight, tower.mlp.fc2.weight.T)
    assert torch.equal(block.attn.b_O, tower.self_attn.out_proj.bias)


@pytest.mark.parametrize(("layer", "n"), [(-1, 3), (-2, 2), (1, 1), ([0], 0), ([0, -3], 1)])
def test_vision_layers_above_the_feature_layer_are_not_built(layer: int | list[int], n: int) -> None:
    model = random_llava.make_pair(random_llava.make_config(vision_feature_layer=layer))[1]
    assert len(model.vision_encoder.blocks) == model.cfg.vision.n_layers == n
    assert not [name for name in model.hook_dict if name.startswith(f"vision_encoder.blocks.{n}.")]
    assert not [name for name, _ in model.named_parameters() if "post_layernorm" in name]


def test_weights_that_no_family_knows() -> None:
    hf = random_llava.make_hf()
    hf.lm_head.bias = nn.Parameter(torch.zeros(hf.lm_head.out_features))
    with pytest.raises(ValueError, match=r"weights that this family does not use: lm_head\.bias"):
        HookedVLM.from_hf(hf)


def test_weights_that_the_model_lacks() -> None:
    hf = random_llava.make_hf()
    hf.model.language_model.norm.weight = None
    with pytest.raises(ValueError, match=r"weights that are missing: ln_final\.weight"):
        HookedVLM.from_hf(hf)


def test_weights_of_another_shape() -> None:
    hf = random_llava.make_hf()
    hf.model.language_model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(39, 32))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up\.weight has shape \[39, 32\], not \[40, 32\]"):
        HookedVLM.from_hf(hf)


def test_positions_table_follows_the_rope_of_the_model_in_memory() -> None:
    """The frequencies come from the config, not from a buffer that a cast may have rounded."""
    hf = random_llava.make_hf()
    exact = HookedVLM.from_hf(hf).rotary.inv_freq.clone()
    hf.to(torch.bfloat16)
    model = HookedVLM.from_hf(hf)
    assert model.cfg.dtype == torch.bfloat16
    assert torch.equal(model.rotary.inv_freq, exact)
