from __future__ import annotations

import json
import shutil
import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from helpers import random_llava
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer

from hones_lens.app.cli import main
from hones_lens.app.random_checkpoint import write
from hones_lens.app.random_checkpoint.write import write_random_checkpoint
from hones_lens.model import all_settings, hook_hf_model, known_config, load_hf_model
from hones_lens.model.config import token_ids

# Parameters as the model pages and the index files of the repositories give them.
PARAMETERS = {
    "llava-1.5-7b": 7_063_427_072,
    "gemma-3-4b": 4_300_079_472,
    "llava-v1.6-mistral-7b": 7_566_747_648,
    "smolvlm-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-8b": 8_767_123_696,
}
HUB_NAMES = {
    "llava-1.5-7b": (
        "language_model.lm_head.weight",
        "language_model.model.layers.31.mlp.down_proj.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    ),
    "gemma-3-4b": (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.33.pre_feedforward_layernorm.weight",
        "language_model.model.layers.33.self_attn.q_norm.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "vision_tower.vision_model.post_layernorm.weight",
    ),
    "llava-v1.6-mistral-7b": (
        "image_newline",
        "language_model.lm_head.weight",
        "language_model.model.layers.31.mlp.down_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
    ),
    "qwen2.5-vl-7b": (
        "lm_head.weight",
        "model.layers.27.self_attn.k_proj.bias",
        "visual.blocks.31.attn.qkv.weight",
        "visual.merger.mlp.2.weight",
        "visual.patch_embed.proj.weight",
    ),
    "qwen3-vl-2b": (
        "model.language_model.layers.27.self_attn.q_norm.weight",
        "model.visual.deepstack_merger_list.2.linear_fc1.weight",
        "model.visual.pos_embed.weight",
    ),
}
ON_HUB = [name for name, settings in all_settings().items() if settings.hub_id]


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_true_sizes_are_those_of_the_repositories(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(known_config(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ON_HUB)
def test_counts_are_true_where_widths_are_small(name):
    true, small = known_config(name), known_config(name, "counts")
    assert small.text_config.hidden_size == 4 * true.text_config.num_attention_heads
    kept = (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    for key in kept:
        assert getattr(small.text_config, key) == getattr(true.text_config, key), key
    assert small.vision_config.patch_size == true.vision_config.patch_size
    assert _vision_neurons(small.vision_config) == _vision_neurons(true.vision_config)


def _vision_neurons(vision):
    return getattr(vision, "intermediate_size", None) or vision.embed_dim * vision.mlp_ratio


def _keys(folder):
    keys = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            keys |= dict.fromkeys(opened.keys(), file.name)
    return keys


def _equal_logits(folder, prompt="what color is the circle?"):
    hf_model, processor = load_hf_model(str(folder), "cpu", torch.float32)
    hooked = hook_hf_model(hf_model, processor)
    inputs = hooked.prepare(random_llava.make_images(1), [prompt])
    with torch.no_grad():
        ours, theirs = hooked(inputs), hf_model(**inputs.to_hf()).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.abs().max())))
    assert float(theirs.std()) > 0.1
    return hooked, inputs


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_shards_load_and_give_hugging_faces_logits(tmp_path, name):
    folder = write_random_checkpoint(name, tmp_path / "a", scale="true", dtype=torch.float32, shard_gb=2e-3)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == _keys(folder)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size < 2.1e6 for file in shards)
    _equal_logits(folder)
    again = write_random_checkpoint(name, tmp_path / "b", scale="true", dtype=torch.float32, shard_gb=2e-3)
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in shards)
    other = write_random_checkpoint(name, tmp_path / "c", scale="true", dtype=torch.float32, seed=1)
    weight = "model.norm.weight" if "qwen" in name else "language_model.model.norm.weight"
    with (
        safe_open(folder / index["weight_map"][weight], "pt") as a,
        safe_open(other / "model.safetensors", "pt") as b,
    ):
        assert not torch.equal(a.get_tensor(weight), b.get_tensor(weight))


def test_memory_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    made, alive, make = list[weakref.ref[Any]](), list[int](), write._weight

    def weight(*args):
        made.append(weakref.ref(new := make(*args)))
        alive.append(sum(ref() is not None for ref in made))
        return new

    monkeypatch.setattr(write, "_weight", weight)
    folder = write_random_checkpoint("tiny-llava", tmp_path / "a", scale="true", shard_gb=1e-3)
    most = max(list(_keys(folder).values()).count(file.name) for file in folder.glob("*.safetensors"))
    assert len(made) > 2 * most and max(alive) == most


def test_what_is_there_is_kept(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["random-checkpoint", "tiny-llava", "--out", str(tmp_path)]) == 1
    assert "holds something already" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_name_lists_the_known(tmp_path, capsys):
    assert main(["random-checkpoint", "lava-1.5-7b", "--out", str(tmp_path / "a")]) == 1
    assert "did you mean 'llava-1.5-7b'" in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2, 1, 1000))
    assert main(["random-checkpoint", "tiny-llava", "--out", str(tmp_path / "a")]) == 1
    assert "GB of weights, but 0.0 GB are free" in capsys.readouterr().err
    assert not list((tmp_path / "a").iterdir())


def test_another_models_tokenizer_is_refused(tmp_path, capsys):
    tokenizer = random_llava.build_llava_tokenizer(512)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = ["random-checkpoint", "llava", "--out", str(tmp_path / "a")]
    assert main([*command, "--tokenizer", str(tmp_path / "tokenizer")]) == 1
    assert "<image> 4, not 32000" in capsys.readouterr().err


def _at_counts(tmp_path, name):
    folder = write_random_checkpoint(name, tmp_path / "model", shard_gb=0.2)
    tokenizer, config = AutoTokenizer.from_pretrained(folder), known_config(name)
    text = config.text_config
    for token_id in (text.bos_token_id, *token_ids(text.eos_token_id), text.pad_token_id):
        assert token_id in tokenizer.all_special_ids
    hooked, inputs = _equal_logits(folder)
    assert (hooked.cfg.n_layers, hooked.cfg.d_mlp) == (text.num_hidden_layers, text.intermediate_size)
    return folder, hooked, inputs


@pytest.mark.exhaustive
def test_llava_at_true_counts(tmp_path):
    folder, hooked, inputs = _at_counts(tmp_path, "llava-1.5-7b")
    assert set(HUB_NAMES["llava-1.5-7b"]) <= set(_keys(folder))
    assert int(inputs.image_mask.sum()) == 576 and hooked.cfg.image_token_id == 32000
    assert len(hooked.tokenizer) == 32002


@pytest.mark.by_hand
@pytest.mark.parametrize("name", sorted(set(ON_HUB) - {"llava-1.5-7b"}))
def test_others_at_true_counts(tmp_path, name):
    folder, hooked, _ = _at_counts(tmp_path, name)
    assert set(HUB_NAMES.get(name, ())) <= set(_keys(folder))
    if "qwen" in name:
        assert hooked.tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
