"""Path patching: all paths are activation patching; single ones are the original procedure's, run by run."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import random_gemma, random_llava, random_qwen, random_qwen3
from helpers.patching_pairs import (
    D_MLP,
    HEADS,
    KV_HEADS,
    LAYERS,
    Hook,
    cached,
    difference,
    effect,
    model_and_pairs,
    put,
    sides,
)
from torch import Tensor

from hones_lens import HookedVLM
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.path import path_patching, path_patching_matrix
from hones_lens.analysis.patching.receivers import every_receiver

# Gemma's attention and MLPs have norms behind them; queries and keys of Gemma and Qwen3-VL have norms.
MADE = {"llava": random_llava, "qwen": random_qwen, "gemma": random_gemma}
QWEN3 = pytest.param(random_qwen3, marks=pytest.mark.exhaustive, id="qwen3")
FAMILIES = pytest.mark.parametrize("made", [*(pytest.param(m, id=n) for n, m in MADE.items()), QWEN3])
DIRECTIONS = pytest.mark.parametrize("direction", ["noise", "denoise"])
THROUGH = pytest.mark.parametrize("through_mlps", [False, True], ids=["stream", "mlps"])
WHOLE = slice(None)


def along(model: HookedVLM, pairs: PatchPairs, *given, **options) -> Tensor:
    """[pair receiver]"""
    options = {"direction": "noise", "by_pair": True, "progress": False} | options
    return path_patching(model, pairs, *given, **options).values


def close(a: Tensor, b: Tensor) -> None:
    assert b.abs().max() > 1e-2, "nothing to see"
    assert (a - b).abs().max() < 1e-4 * b.abs().max().clamp(min=1)


def patched(
    model: HookedVLM, pairs: PatchPairs, direction: str, senders: list[tuple[int, int]]
) -> list[Hook]:
    """Activation patching of heads."""
    _, source = sides(pairs, direction)
    names = [(f"blocks.{layer}.attn.hook_z", head) for layer, head in senders]
    return [put(name, cached(model, source, name), (WHOLE, WHOLE, head)) for name, head in names]


# -- all paths -----------------------------------------------------------------------------------------


@FAMILIES
@DIRECTIONS
@pytest.mark.parametrize("senders", [[(0, 1)], [(0, 0), (1, 2), (1, 3)], [(2, 1)]], ids=len)
def test_all_paths_are_activation_patching(
    made: ModuleType, direction: str, senders: list[tuple[int, int]]
) -> None:
    model, pairs = model_and_pairs(made)
    real = effect(model, pairs, direction, patched(model, pairs, direction, senders))
    options = {"direction": direction}
    stream = {"all": every_receiver(model, senders)}
    close(along(model, pairs, senders, stream, **options)[:, 0], real)
    # MLPs pass the change on; some neurons receive it beside.
    heads = every_receiver(model, senders, neurons=False)
    some = [(layer, i) for layer in range(senders[0][0], LAYERS) for i in range(layer, D_MLP, 3)]
    mlps = {"heads": heads, "neurons too": [*heads, *some]}
    found = along(model, pairs, senders, mlps, through_mlps=True, **options)
    close(found, real[:, None].expand(-1, 2))


@FAMILIES
def test_all_receivers_are_listed(made: ModuleType) -> None:
    model, _ = model_and_pairs(made)
    found = every_receiver(model, [(1, 0), (2, 0)])
    assert len(found) == len(set(found)) == 1 + HEADS + 2 * KV_HEADS + 2 * D_MLP
    assert {r[0] for r in found if len(r) == 3} == {2}
    assert set(every_receiver(model, [(1, 0)], neurons=False)) == {r for r in found if len(r) != 2}


# -- single paths --------------------------------------------------------------------------------------


def in_three_runs(
    model: HookedVLM,
    pairs: PatchPairs,
    sender: tuple[int, int],
    receivers: list[tuple],
    through_mlps: bool,
) -> Tensor:
    """The procedure of Wang et al., Appendix B: the change of receivers of one layer, [pair].

    The sender is patched while all other heads (and MLPs) are held at the base run; what receivers then get
    is put into the base run.
    """
    base = pairs.clean
    held = [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]
    held += [] if through_mlps else [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
    freeze = [put(name, cached(model, base, name), (WHOLE,)) for name in held]
    sending = [*freeze, *patched(model, pairs, "noise", [sender])]
    if receivers == ["logits"]:
        return difference(model, pairs, base, sending) - difference(model, pairs, base, [])
    got: list[Hook] = []
    for receiver in receivers:
        name = f"blocks.{receiver[0]}." + (
            "mlp.hook_post" if len(receiver) == 2 else f"attn.hook_{receiver[2]}"
        )
        with torch.no_grad(), model.hooks(fwd_hooks=sending):
            value = cached(model, base, name)
        at = (..., receiver[1]) if len(receiver) == 2 else (WHOLE, WHOLE, receiver[1])
        got.append(put(name, value, at))
    return effect(model, pairs, "noise", got)


@pytest.mark.exhaustive
@FAMILIES
@THROUGH
def test_receivers_get_what_the_procedure_in_three_runs_gives_them(
    made: ModuleType, through_mlps: bool
) -> None:
    model, pairs = model_and_pairs(made)
    groups: dict[str, list] = {
        "logits": ["logits"],
        "q": [(2, 3, "q")],
        "k": [(1, 0, "k")],
        "v": [(2, 1, "v")],
        "two heads": [(1, 1, "q"), (1, 1, "v"), (1, 2, "q")],
        "neurons": [(1, i) for i in range(0, D_MLP, 2)],
        "own MLP": [(0, i) for i in range(0, D_MLP, 2)],
    }
    found = along(model, pairs, [(0, 2)], groups, through_mlps=through_mlps)
    real = [in_three_runs(model, pairs, (0, 2), some, through_mlps) for some in groups.values()]
    close(found, torch.stack(real, dim=1))


@FAMILIES
def test_the_direct_path_to_the_logits_by_hand(made: ModuleType) -> None:
    model, pairs = model_and_pairs(made)
    found = along(model, pairs, [(0, 3), (2, 1)], direction="denoise")[:, 0]
    with torch.no_grad():
        clean, corrupted = (
            model.run_with_cache(
                inputs,
                names_filter=["blocks.0.attn.hook_z", "blocks.2.attn.hook_z", "blocks.2.hook_resid_post"],
            )[1]
            for inputs in (pairs.clean, pairs.corrupted)
        )
        was = corrupted["blocks.2.hook_resid_post"][:, -1].double()
        now = was.clone()
        for layer, head in ((0, 3), (2, 1)):
            name, block = f"blocks.{layer}.attn.hook_z", model.blocks[layer]
            changed = corrupted[name].clone()
            changed[:, :, head] = clean[name][:, :, head]
            wrote, writes = (
                (z.flatten(2) @ block.attn.o.weight.T)[:, -1] for z in (corrupted[name], changed)
            )
            if block.ln1_post is not None:
                wrote, writes = block.ln1_post(wrote), block.ln1_post(writes)
            now += (writes - wrote).double()
        directions = (model.W_U[:, pairs.answer] - model.W_U[:, pairs.foil]).T * model.ln_final.weight
        scores = [
            ((x * directions).sum(-1) / (x.pow(2).mean(-1) + model.ln_final.eps).sqrt()) for x in (now, was)
        ]
    close(found, scores[0] - scores[1])


@FAMILIES
@THROUGH
def test_what_no_sender_comes_before_receives_nothing(made: ModuleType, through_mlps: bool) -> None:
    model, pairs = model_and_pairs(made)
    receivers: list = [(1, 0, "q"), (2, 3, "q"), (2, 1, "k"), (2, 0, "v"), (1, 5), (2, 7), "logits"]
    found = along(model, pairs, [(2, 1)], receivers, through_mlps=through_mlps)
    assert (found[:, :5] == 0).all()
    assert (found[:, 5:] != 0).all()


@FAMILIES
def test_a_change_at_some_positions_alone(made: ModuleType) -> None:
    model, pairs = model_and_pairs(made)
    image, rest = pairs.mask("image"), ~pairs.mask("image")
    name = "blocks.0.attn.hook_z"
    theirs = cached(model, pairs.corrupted, name)
    at = (image[:, :, None] & (torch.arange(HEADS) == 1)).nonzero(as_tuple=True)
    real = effect(model, pairs, "noise", [put(name, theirs, at)])
    everyone = {"all": every_receiver(model, [(0, 1)])}
    close(along(model, pairs, [(0, 1)], everyone, positions="image")[:, 0], real)
    alone = along(model, pairs, [(0, 1)], positions=rest)
    assert torch.equal(alone, along(model, pairs, [(0, 1)]))  # the logits' own position is no image token


# -- many at once --------------------------------------------------------------------------------------


@FAMILIES
def test_the_matrix_has_every_single_path(made: ModuleType) -> None:
    """Shares of the gap; and changes with their intervals: a resampled gap near 0 makes rounding large."""
    model, pairs = model_and_pairs(made)
    receivers: list = ["logits", (2, 1, "q"), (1, 1, "v"), (2, 5)]
    senders = ((1, 3), (0, 2))
    options = {"through_mlps": True, "direction": "denoise", "progress": False, "batch_size": 2}
    for raw, names in ((False, ("values",)), (True, ("values", "low", "high"))):
        options["raw"] = raw
        full = path_patching_matrix(model, pairs, None, receivers, **options)
        assert full.axes == ("layer", "head", "receiver") and full.shape == (LAYERS, HEADS, 4) and full.n == 3
        assert full.names("receiver") == ("logits", "2.1.q", "1.1.v", "2.n5")
        some = path_patching_matrix(model, pairs, list(senders), receivers, **options)
        assert some.axes == ("sender", "receiver") and some.names("sender") == ("1.3", "0.2")
        for i, sender in enumerate(senders):
            single = path_patching(model, pairs, [sender], receivers, **options | {"batch_size": 3})
            for name in names:
                of_full, of_some = getattr(full, name)[sender], getattr(some, name)[i]
                assert torch.allclose(of_full, getattr(single, name), atol=1e-4)
                assert torch.allclose(of_some, of_full, atol=1e-4)
        assert full.values[0].abs().max() > 5e-3


def test_lasting_hooks_are_kept_or_refused() -> None:
    model, pairs = model_and_pairs(random_qwen)
    plain = along(model, pairs, [(0, 1)])
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 2 * x)]):
        assert (along(model, pairs, [(0, 1)]) - plain).abs().max() > 1e-3
        everyone = {"all": every_receiver(model, [(0, 1)])}
        real = effect(model, pairs, "noise", patched(model, pairs, "noise", [(0, 1)]))
        close(along(model, pairs, [(0, 1)], everyone)[:, 0], real)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", lambda x, hook: 2 * x)]):
        along(model, pairs, [(0, 1)])
        with pytest.raises(ValueError, match=r"hooks at blocks\.1\.attn\.hook_q, which path patching"):
            along(model, pairs, [(0, 1)], [(1, 2, "q")])


def test_it_refuses() -> None:
    model, pairs = model_and_pairs(random_llava)
    wrong = (
        ([], "logits", "at least one head"),
        ([(0, 1), (0, 1)], "logits", "each once"),
        ([(0, 4)], "logits", "head L0H4 does not exist: 3 layers of 4 heads"),
        ([(3, 0)], "logits", "head L3H0 does not exist"),
        ([(0, 1)], [], "no receivers"),
        ([(0, 1)], {"none": []}, "'none': give at least one"),
        ([(0, 1)], ["logits", "logits"], "twice"),
        ([(0, 1)], [(1, 2, "z")], "at 'q', 'k' or 'v'"),
        ([(0, 1)], [(1, 2, "k")], "key-value head L1H2 does not exist: 3 layers of 2 key-value heads"),
        ([(0, 1)], [(1, 40)], "neuron L1N40 does not exist: 3 layers of 40 neurons"),
        ([(0, 1)], [(3, 0, "q")], "head L3H0 does not exist: 3 layers of 4 heads"),
    )
    for senders, receivers, message in wrong:
        with pytest.raises(ValueError, match=message):
            path_patching(model, pairs, senders, receivers, progress=False)
    with pytest.raises(ValueError, match="unknown direction"):
        path_patching(model, pairs, [(0, 1)], direction="sideways", progress=False)
    with pytest.raises(ValueError, match="token group 'answer'"):
        path_patching(model, pairs, [(0, 1)], positions="answer", progress=False)
