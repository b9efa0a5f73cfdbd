"""What caches hold is their own: no views, no storage shared with other entries or with later steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hooked_pairs import Pair, hooks_that_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from hones_lens import VLMInputs


def everything(name: str) -> bool:
    return True


def check_own(entries: Any) -> None:
    """Every entry is contiguous, fills its storage, and shares it with no other."""
    owners: dict[int, str] = {}
    for name, entry in entries.items():
        storage = entry.untyped_storage()
        assert entry.is_contiguous(), name
        assert storage.nbytes() == entry.numel() * entry.element_size(), name
        if entry.numel():
            assert owners.setdefault(storage.data_ptr(), name) == name
        assert not entry.requires_grad, name


def batches(pair: Pair) -> dict[str, VLMInputs]:
    return {
        "mixed": pair.answered,
        "text": pair.model.prepare(None, "is it red?", answers="no"),
        "encoded": pair.model.with_image_embeds(pair.answered),
    }


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", ["mixed", "text", "encoded"])
@pytest.mark.parametrize("cut", [None, -1, (2, 9), [0, 3], slice(None, None, 5), slice(-1, None)])
def test_entries_are_their_own(pair: Pair, what: str, cut: Any) -> None:
    inputs = batches(pair)[what]
    _, cache = pair.model.run_with_cache(
        inputs,
        names_filter=hooks_that_run(pair.model, inputs),
        pos_slice=cut,
        incl_bwd=True,
        return_type="loss",
    )
    pair.model.zero_grad(set_to_none=True)
    check_own(cache)
    for rows in (slice(0, 2), [0], 0):
        check_own(cache.apply_slice_to_batch_dim(rows))
    _, one = pair.model.run_with_cache(inputs[0], pos_slice=cut, remove_batch_dim=True)
    check_own(one)


def test_a_cache_is_saved_whole(pair: Pair, tmp_path: Path) -> None:
    names = hooks_that_run(pair.model, pair.answered)
    _, cache = pair.model.run_with_cache(pair.answered, names_filter=names, incl_bwd=True, return_type="loss")
    pair.model.zero_grad(set_to_none=True)
    save_file(cache.cache_dict, tmp_path / "cache.safetensors")
    loaded = load_file(tmp_path / "cache.safetensors")
    assert set(loaded) == set(cache)
    assert all(torch.equal(loaded[name], cache[name]) for name in cache)
    _, few = pair.model.run_with_cache(pair.inputs, pos_slice=(-2, None))
    save_file(few.cache_dict, tmp_path / "few.safetensors")
    wanted = sum(entry.numel() * entry.element_size() for entry in few.values())
    assert (tmp_path / "few.safetensors").stat().st_size < wanted + 2**15


class EditsInPlace:
    """A hook that edits every tensor in place, and remembers what it was before and after."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, hook: Any) -> None:
        self.given[hook.name], self.before[hook.name] = x, x.clone()
        x.mul_(0.9)
        self.after[hook.name] = x.clone()


@pytest.mark.parametrize("what", ["mixed", "text", "encoded"])
def test_an_edit_in_place_rewrites_no_earlier_entry(pair: Pair, what: str) -> None:
    """At every hook at once: caches keep what was there, and no other hook's edit reaches a reference."""
    inputs, edits = batches(pair)[what], EditsInPlace()
    cache, fwd_hooks, _ = pair.model.get_caching_hooks(hooks_that_run(pair.model, inputs))
    with torch.no_grad(), pair.model.hooks([*fwd_hooks, (everything, edits)]):
        pair.model(inputs)
    assert set(cache) == set(edits.before) and len(cache) > 50
    for name in cache:
        assert torch.equal(cache[name], edits.before[name]), name
        assert torch.equal(edits.given[name], edits.after[name]), name


def test_an_edited_gradient_rewrites_no_earlier_entry(pair: Pair) -> None:
    """Gradients of sums are one tensor at several hooks; each entry keeps its own."""
    names = hooks_that_run(pair.model, pair.answered)
    cache, fwd_hooks, bwd_hooks = pair.model.get_caching_hooks(names, incl_bwd=True)
    edits = EditsInPlace()
    with pair.model.hooks(fwd_hooks, [*bwd_hooks, (everything, edits)]):
        pair.model(batches(pair)["mixed"], return_type="loss").backward()
    pair.model.zero_grad(set_to_none=True)
    assert len(edits.before) > 60
    for name, before in edits.before.items():
        assert torch.equal(cache[f"{name}_grad"], before), name


@pytest.mark.parametrize("edited", ["hook_attn_out", "hook_resid_mid", "attn.hook_result", "hook_mlp_out"])
def test_a_gradient_edited_in_place_is_the_returned_one(pair: Pair, edited: str) -> None:
    """Halved at one term of a sum: the gradient on the other way stays."""

    def in_place(gradient: Tensor, hook: Any) -> None:
        gradient.mul_(0.5)

    def returned(gradient: Tensor, hook: Any) -> Tensor:
        return gradient * 0.5

    found: list[Tensor] = []
    for edit in (in_place, returned):
        entering: list[Tensor] = []
        read = ("blocks.0.hook_resid_pre", lambda gradient, hook, kept=entering: kept.append(gradient))
        with pair.model.hooks(bwd_hooks=[(f"blocks.1.{edited}", edit), read]):
            pair.model(pair.answered, return_type="loss").backward()
        pair.model.zero_grad(set_to_none=True)
        found += entering
    torch.testing.assert_close(found[0], found[1], atol=1e-7, rtol=1e-5)
    assert found[0].abs().max() > 1e-4


def test_an_edit_of_an_entry_changes_no_other(pair: Pair) -> None:
    names = hooks_that_run(pair.model, pair.inputs)
    _, cache = pair.model.run_with_cache(pair.inputs, names_filter=names)
    copies = {name: value.clone() for name, value in cache.items()}
    rows = cache.apply_slice_to_batch_dim(slice(0, 2))
    for name in cache:
        rows[name].fill_(7)
    assert all(torch.equal(cache[name], copies[name]) for name in cache)
