"""For every family: each hook is causal, and means what it means in Hugging Face's model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.families import SHAPE_PARAMS, FamilyPair, family_pair, forget_positions
from helpers.hooked_pairs import BY_HEAD_PAIR, COSTLY, hf_edited, identity, noise_hook
from torch import Tensor

from hones_lens.model.nn.mlp import GatedMLP

# Our hook in a block: the module at whose output or input Hugging Face's model has it.
SITES = {
    "attn.hook_q": ("attn.q", "output"),
    "attn.hook_k": ("attn.k", "output"),
    "attn.hook_v": ("attn.v", "output"),
    "attn.hook_q_norm": ("attn.q_norm", "output"),
    "attn.hook_k_norm": ("attn.k_norm", "output"),
    "attn.hook_z": ("attn.o", "input"),
    "hook_attn_out": ("attn.o", "output"),
    "mlp.hook_post": ("mlp.down", "input"),
    "hook_mlp_out": ("mlp.down", "output"),
    "mlp.hook_pre_linear": ("mlp.up", "output"),
}


@pytest.fixture(scope="module", params=SHAPE_PARAMS)
def pair(request: pytest.FixtureRequest) -> FamilyPair:
    return family_pair(request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_every_hook_is_causal_and_identity_changes_nothing(pair: FamilyPair) -> None:
    model, inputs = pair.model, pair.inputs
    clean, dead, changed = model(inputs), [], []
    for name in model.hook_dict:
        if pair.difference(model.run_with_hooks(inputs, fwd_hooks=[(name, noise_hook())]), clean) < 1e-3:
            dead.append(name)
        same = model.run_with_hooks(inputs, fwd_hooks=[(name, identity)])
        exact = not name.endswith((*BY_HEAD_PAIR, *COSTLY))  # those run another kernel
        if not (torch.equal(same, clean) if exact else pair.difference(same, clean) <= 1e-4):
            changed.append(name)
    assert not dead
    assert not changed


def hf_site(pair: FamilyPair, name: str) -> tuple[str, str] | None:
    """Module of Hugging Face's model, and whether our hook is at its output or its input."""
    modules = pair.hf_modules
    if "blocks." not in name:
        return None
    prefix, _, rest = name.rpartition("blocks.")
    layer, _, site = rest.partition(".")
    block = f"{prefix}blocks.{layer}"
    if site in (
        "hook_resid_pre",
        "hook_resid_post",
        "hook_deepstack",
    ):  # what is added behind a block commutes
        if prefix:
            return None  # Hugging Face's towers record a state before a hook could change it
        of_block = modules[f"{block}.mlp.down"].rsplit(".", 2)[0]
        return of_block, "input" if site.endswith("pre") else "output"
    ours, where = SITES.get(site, ("", ""))
    if site == "mlp.hook_pre":
        gated = isinstance(pair.model.get_submodule(f"{block}.mlp"), GatedMLP)
        ours, where = f"mlp.{'gate' if gated else 'up'}", "output"
    behind = {"hook_attn_out": "ln1_post", "hook_mlp_out": "ln2_post"}.get(site)
    theirs = modules.get(f"{block}.{behind}", modules.get(f"{block}.{ours}"))
    return None if theirs is None else (theirs, where)


def test_edits_are_those_of_hf(pair: FamilyPair) -> None:
    """The same noise, by our hook and by a hook of Hugging Face's module, in every block."""
    clean, unequal, compared = pair.model(pair.inputs), [], 0
    for name in pair.model.hook_dict:
        if (site := hf_site(pair, name)) is None:
            continue
        noise: list[Tensor] = []
        found = pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(name, partial(_disturb, noise))])
        forget_positions(pair.hf)
        with hf_edited(pair.hf, *site, partial(_add, noise)):
            expected = pair.hf_logits(pair.inputs)
        compared += 1
        if pair.difference(found, expected) > 1e-4 or pair.difference(clean, expected) < 1e-3:
            unequal.append((name, pair.difference(found, expected)))
    assert not unequal
    assert compared >= 10 * pair.model.cfg.n_layers


def _disturb(noise: list[Tensor], x: Tensor, hook: object) -> Tensor:
    noise.append(0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    return x + noise[0]


def _add(noise: list[Tensor], x: Tensor) -> Tensor:
    heads_first = x.ndim == 4 and noise[0].ndim == 4 and x.shape != noise[0].shape
    return x + (noise[0].transpose(1, 2) if heads_first else noise[0]).reshape(x.shape)


def test_norms_mean_what_they_mean_in_hf(pair: FamilyPair) -> None:
    """A scale twice as large halves what is normalised; all norms but of towers that fuse their blocks."""
    names = [name.removesuffix(".hook_scale") for name in pair.model.hook_dict if name.endswith("hook_scale")]
    compared = 0
    for name in names:
        if (theirs := pair.hf_modules.get(name)) is None:
            continue
        module = pair.hf.get_submodule(theirs)
        bias = getattr(module, "bias", None)

        def halved(out: Tensor, bias: Tensor | None = bias) -> Tensor:
            return out / 2 if bias is None else (out - bias) / 2 + bias

        twice: Callable = lambda x, hook: 2 * x  # noqa: E731
        found = pair.model.run_with_hooks(pair.inputs, fwd_hooks=[(f"{name}.hook_scale", twice)])
        with hf_edited(pair.hf, theirs, "output", halved):
            expected = pair.hf_logits(pair.inputs)
        assert pair.difference(found, expected) <= 1e-4, name
        compared += 1
    assert compared >= 2 * pair.model.cfg.n_layers + 1


def test_the_direct_parts_add_up_to_the_stream(pair: FamilyPair) -> None:
    """Embedding, and what attention, MLPs and pictures (DeepStack) write, are the last stream."""
    _, cache = pair.model.run_with_cache(pair.inputs)
    total = cache["hook_embed"].clone()
    for layer in range(pair.model.cfg.n_layers):
        total += cache["attn_out", layer] + cache["mlp_out", layer]
    for layer in range(pair.model.cfg.n_deepstack):
        total += cache[f"blocks.{layer}.hook_deepstack"]
    last = cache["resid_post", pair.model.cfg.n_layers - 1]
    assert pair.difference(total, last) <= 1e-4 * float(last.abs().max())
    assert pair.difference(cache.decompose_resid().sum(0), last) <= 1e-4 * float(last.abs().max())
    logits = pair.model.unembed(pair.model.ln_final(total))
    assert pair.difference(logits, pair.hf_logits(pair.inputs)) <= 1e-3
