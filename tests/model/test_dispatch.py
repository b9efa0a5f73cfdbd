"""Models laid over CPU, disk and several devices compute what they do on one, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers import random_llava, random_qwen
from helpers.hooked_pairs import hooks_that_run, identity, noise_hook
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageTextToText

from hones_lens import HookedVLM, attribute_neurons, checkpoint_path, load_examples, load_task, localize_heads
from hones_lens.app.cli import main
from hones_lens.app.runs.identity import weights_hash
from hones_lens.interventions import fold_head_scales, fold_neuron_scales
from hones_lens.model.dispatch import check_device_map
from hones_lens.model.nn.context import AttentionContext
from hones_lens.model.nn.placed import PlacedEmbedding, PlacedLinear, place

FAMILIES = {"llava": random_llava, "qwen": random_qwen}


def half_on_disk(hf: Any, folder: Path) -> Any:
    """Loaded by Hugging Face: vision tower, embedding, unembedding and a layer on disk, the rest not."""
    hf.save_pretrained(folder / "checkpoint")
    parts = [name for name, _ in hf.model.named_children() if name != "language_model"]
    places = {"model.language_model.layers.0": "disk", "lm_head": "disk"}
    places |= {"model.language_model.embed_tokens": "disk"} | {f"model.{part}": "disk" for part in parts}
    for part in ("norm", "rotary_emb", "layers.1", "layers.2"):
        places[f"model.language_model.{part}"] = "cpu"
    return AutoModelForImageTextToText.from_pretrained(folder / "checkpoint", device_map=places).eval()


CPU = {"execution_device": torch.device("cpu")}
LAYOUTS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda hf, folder: cpu_offload(deepcopy(hf), **CPU),
    "disk": lambda hf, folder: disk_offload(deepcopy(hf), folder / "weights", **CPU),
    "half on disk": half_on_disk,
}


QUICK = [("llava", "half on disk"), ("qwen", "disk")]
ALL = [(family, layout) for family in FAMILIES for layout in LAYOUTS]


@pytest.fixture(
    params=[pytest.param(e, id=" ".join(e), marks=() if e in QUICK else pytest.mark.slow) for e in ALL]
)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[HookedVLM, HookedVLM, Any]:
    """A model on one device, the same laid out, and a batch of mixed rows."""
    family, layout = request.param
    hf, plain = FAMILIES[family].make_pair()
    placed = HookedVLM.from_hf(LAYOUTS[layout](hf, tmp_path), plain.processor)
    assert any(isinstance(module, PlacedLinear) for module in placed.modules())
    return plain, placed, FAMILIES[family].mixed_batch(plain)


@pytest.mark.exhaustive
@torch.no_grad()
def test_passes_hooks_caches_and_answers_are_the_same_bits(models: tuple[HookedVLM, HookedVLM, Any]) -> None:
    plain, placed, inputs = models
    names = hooks_that_run(plain, inputs)
    logits, cache = plain.run_with_cache(inputs, names_filter=names)
    placed_logits, placed_cache = placed.run_with_cache(inputs, names_filter=names)
    assert torch.equal(placed_logits, logits) and set(placed_cache) == set(cache)
    for name in cache:
        assert torch.equal(placed_cache[name], cache[name]), name
        assert placed_cache[name].device == placed.cfg.device
    hooks = [(name, noise_hook()) for name in ("blocks.1.attn.hook_z", "blocks.0.mlp.hook_post")]
    hooks += [(name, identity) for name in names if name.endswith(("hook_result", "hook_q_input"))]
    edited = plain.run_with_hooks(inputs, fwd_hooks=hooks)
    assert not torch.equal(edited, logits)
    assert torch.equal(placed.run_with_hooks(inputs, fwd_hooks=hooks), edited)
    assert torch.equal(
        placed.generate(inputs, 5, return_type="tokens"), plain.generate(inputs, 5, return_type="tokens")
    )


def test_gradients_of_activations_are_the_same_bits(models: tuple[HookedVLM, HookedVLM, Any]) -> None:
    found = []
    for model in models[:2]:
        _, cache = model.run_with_cache(
            models[2], names_filter="blocks.0.mlp.hook_post", incl_bwd=True, return_type="loss"
        )
        found.append(cache["blocks.0.mlp.hook_post_grad"])
    assert torch.equal(*found) and bool(found[0].any())


@torch.no_grad()
def test_weights_are_read_where_they_rest(models: tuple[HookedVLM, HookedVLM, Any], tmp_path: Path) -> None:
    plain, placed, _ = models
    for name in (
        "W_E",
        "W_U",
        "b_U",
        "W_Q",
        "W_K",
        "W_V",
        "W_O",
        "W_gate",
        "W_in",
        "W_out",
        "b_Q",
        "b_O",
        "b_out",
    ):
        assert torch.equal(getattr(placed, name), getattr(plain, name)), name
    assert torch.equal(placed.vision_encoder.blocks[1].attn.W_V, plain.vision_encoder.blocks[1].attn.W_V)
    parameters, expected = placed.tl_parameters(), plain.tl_parameters()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    state, expected = placed.state_dict(), plain.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert weights_hash(placed) == weights_hash(plain)
    plain.save_pretrained(tmp_path / "plain")
    placed.save_pretrained(tmp_path / "placed")
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "placed")]
    assert saved[0] == saved[1]


@torch.no_grad()
def test_edits_that_would_be_lost_are_refused(models: tuple[HookedVLM, HookedVLM, Any]) -> None:
    placed, block = models[1], models[1].blocks[0]

    def multiply() -> None:
        block.attn.W_O[1] *= 2

    def assign() -> None:
        block.mlp.W_out[7] = 0

    edits = [
        multiply,
        assign,
        lambda: block.mlp.W_in.zero_(),
        lambda: torch.unbind(block.attn.W_Q)[0].T.fill_(1),
        lambda: fold_neuron_scales(placed, [(0, 3)], [0.0]),
        lambda: fold_head_scales(placed, [(0, 1)], [0.0]),
    ]
    for edit in edits:
        with pytest.raises(ValueError, match="an edit would be lost: load the model onto one device"):
            edit()
    edited = block.mlp.W_out.clone()
    edited[7] = 0  # a copy of one's own
    for move in (lambda: placed.to("cpu"), placed.bfloat16):
        with pytest.raises(ValueError, match="stays where and as it is"):
            move()
    placed.requires_grad_()
    with pytest.raises(ValueError, match="offloaded can't be trained"):
        placed(models[2])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_stages_on_a_model_that_is_half_on_disk_give_the_same_numbers(name: str) -> None:
    plain = HookedVLM.from_pretrained(name)
    parts = dict.fromkeys(["model.language_model.embed_tokens", "model.language_model.norm"], "cpu")
    parts |= {"model.language_model.rotary_emb": "cpu", "lm_head": "disk"}
    parts |= {f"model.language_model.layers.{l}": ("cpu", "disk")[l % 2] for l in range(plain.cfg.n_layers)}
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint_path(name))
    parts |= {f"model.{part}": "disk" for part, _ in hf.model.named_children() if part != "language_model"}
    placed = HookedVLM.from_pretrained(name, device_map=parts)
    examples = load_examples("shapes", "vqa", "discovery", limit=3)
    found = []
    for model in (plain, placed):
        heads = localize_heads(model, load_task("vqa"), examples, top_k=3, progress=False)
        neurons = attribute_neurons(model, load_task("vqa"), examples, heads, progress=False)
        found.append((heads.drops, neurons.scores))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def fakes(module: nn.Module, device: str) -> None:
    """Give a module parameters without values on a device."""
    for each in module.modules():
        for name, parameter in each.named_parameters(recurse=False):
            setattr(
                each, name, nn.Parameter(torch.empty(parameter.shape, device=device), requires_grad=False)
            )


def test_layers_on_another_gpu_run_there_and_activations_stay_on_the_first() -> None:
    _, model = random_llava.make_pair()
    home = torch.device("cuda:0")
    seen: dict[str, torch.device] = {}
    ran: list[torch.device] = []

    def see(x: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = x.device

    with FakeTensorMode(allow_non_fake_inputs=True):  # refuses tensors of two devices in one operation
        fakes(model, "cuda:0")
        fakes(model.blocks[1], "cuda:1")
        resid = torch.empty(2, 5, model.cfg.d_model, device=home)
        context = AttentionContext(causal=True)
        with pytest.raises(RuntimeError, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0"):
            model.run_blocks(resid, context)
        place(model, home, {})
        assert isinstance(model.blocks[1].attn.q, PlacedLinear)
        assert not isinstance(model.blocks[0].attn.q, PlacedLinear)
        weight = model.blocks[1].attn.q.resting("weight")
        assert weight is not None
        ran.append(weight.device)
        points = ("attn.hook_q", "attn.hook_z", "hook_resid_mid", "ln2.hook_scale", "mlp.hook_post")
        with model.hooks([(f"blocks.1.{point}", see) for point in points]):
            out = model.run_blocks(resid, context)
    assert ran == [torch.device("cuda:1")] and out.device == home
    assert set(seen.values()) == {home} and len(seen) == len(points)


def test_an_embedding_in_the_memory_of_the_cpu_is_not_moved() -> None:
    with FakeTensorMode():
        like = nn.Embedding(10, 4).requires_grad_(False)
        table = PlacedEmbedding(like, torch.device("cuda:0"), {})
        assert table(torch.zeros(2, 3, dtype=torch.long, device="cuda:0")).device == torch.device("cuda:0")
        resting = table.resting("weight")
        assert resting is not None and resting.device.type == "cpu"


def test_weights_that_were_never_loaded_are_named_and_counted() -> None:
    hf = random_llava.make_hf()
    hf.model.language_model.layers[1].mlp.to("meta")
    total = len(list(hf.parameters()))
    with pytest.raises(
        ValueError, match=rf"3 of {total} weights are not in memory, .*layers\.1\.mlp\.gate_proj"
    ):
        HookedVLM.from_hf(hf)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ((None, None), (None, None)),
        (("auto", None), (None, "auto")),
        (("auto", "sequential"), (None, "sequential")),
        (("cpu", None), ("cpu", None)),
        ((None, "cpu"), ("cpu", None)),
        ((None, "cuda:1"), ("cuda:1", None)),
        ((None, {"": 0}), (None, {"": 0})),
    ],
)
def test_a_device_map_may_be_given_in_several_ways(given: Any, read: Any) -> None:
    assert check_device_map(*given) == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("cpu", "auto"), "'cpu' and device_map 'auto' are both given"),
        ((None, "atuo"), "device_map.*did you mean 'auto'"),
        ((None, {"model.language_modle": "cpu"}), "no module 'model.language_modle'; did you mean"),
        ((None, {"lm_head": "cpu"}), "leaves out .*model.vision_tower"),
    ],
)
def test_wrong_device_maps_are_refused_by_name(given: Any, message: str) -> None:
    device, device_map = given
    with pytest.raises(ValueError, match=message):
        HookedVLM.from_pretrained("tiny-llava", device, device_map=device_map)


def test_the_device_map_of_a_file_reaches_the_model_unless_a_device_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def load(name: str, device: Any, dtype: Any, **options: Any) -> None:
        given.append((device, options["device_map"]))
        raise ValueError("far enough")

    monkeypatch.setattr("hones_lens.model.load_model", load)
    parts = {"": "cpu", "lm_head": "disk"}
    files = {"word": "auto", "parts": parts}
    for name, value in files.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"model": {"name": "llava", "device_map": value}}))
    (tmp_path / "own.yaml").write_text(json.dumps({"device_map": parts}))
    for file, *more in (["word"], ["parts"], ["own"], ["word", "--device", "cpu"]):
        assert main(["evaluate", "--config", str(tmp_path / f"{file}.yaml"), *more]) == 1
    assert main(["evaluate", "--device-map", json.dumps(parts)]) == 1
    assert "far enough" in capsys.readouterr().err
    assert given == [(None, "auto"), (None, parts), (None, parts), ("cpu", None), (None, parts)]


def test_without_accelerate_a_device_map_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hones_lens.model.dispatch.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hones_lens\[accelerate\]'"):
        partial(HookedVLM.from_pretrained, device_map={"": "cpu"})("tiny-llava")
