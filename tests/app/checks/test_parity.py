from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import random_llava
from transformers import GenerationConfig

from hones_lens import Decoding, HookedVLM
from hones_lens.app.checks import parity
from hones_lens.app.checks.live_hooks import hooks_without_effect, sample_of_hooks
from hones_lens.app.checks.parity import check_model


@pytest.fixture
def pair():
    theirs, ours = random_llava.make_pair()
    return ours, theirs


def _failed(checks):
    return [check.name for check in checks if not check.passed]


def test_a_faithful_model_passes(pair):
    checks = check_model(*pair, max_new_tokens=4)
    assert not _failed(checks) and len(checks) == 6


def test_a_wrong_weight_fails_parity(pair):
    ours, theirs = pair
    ours.blocks[1].attn.o.weight = torch.nn.Parameter(ours.blocks[1].attn.o.weight * 1.05)
    assert "logits equal Hugging Face's" in _failed(check_model(ours, theirs, max_new_tokens=2))


@pytest.mark.parametrize("quick", [True, False])
def test_a_good_model_passes_both_checks(pair, quick):
    checks = check_model(*pair, max_new_tokens=2, quick=quick)
    assert not _failed(checks)
    (hooks,) = [check for check in checks if check.name == "every hook is causal"]
    assert (f"of {len(pair[0].hook_dict)} hooks" in hooks.figure) is quick


class _Ignored(torch.nn.Module):
    """Runs a hook point, and hands on what came in."""

    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, x):
        self.point(x)
        return x


IGNORED = [
    "vision_encoder.blocks.0.attn.hook_z",
    "vision_projector.hook_out",
    "hook_text_embed",
    "hook_embed",
]
IGNORED += ["ln_final.hook_normalized"]
IGNORED += [
    f"blocks.0.{kind}"
    for kind in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
]
IGNORED += [f"blocks.0.attn.hook_{kind}" for kind in ("q", "k", "v", "rot_q", "attn_scores", "pattern", "z")]
IGNORED += ["blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post", "blocks.0.ln1.hook_scale"]


@pytest.mark.parametrize("quick", [True, False])
def test_hooks_whose_edits_are_ignored_are_found(pair, quick):
    """One of each way to be without effect, all at once: none of them changes what the model computes."""
    ours, _ = pair
    for name in IGNORED:
        parent, _, own = name.rpartition(".")
        setattr(ours.get_submodule(parent), own, _Ignored(ours.hook_dict[name]))
    names = list(ours.hook_dict)
    names = sample_of_hooks(names) if quick else names
    found = hooks_without_effect(ours, ours.prepare(random_llava.make_images(1), ["what?"]), names)
    assert sorted(found) == sorted(IGNORED)


def test_a_quick_check_has_every_kind_in_three_layers():
    names = [f"blocks.{layer}.{kind}" for layer in range(9) for kind in ("attn.hook_z", "hook_mlp_out")]
    assert {name.split(".")[1] for name in sample_of_hooks(names)} == {"0", "4", "8"}
    assert len(sample_of_hooks([*names, "hook_embed"])) == 7


def test_a_dead_hook_is_found(pair):
    ours, theirs = pair
    ours.blocks[2].mlp.hook_post = torch.nn.Identity()  # the hook point is still in hook_dict, and never runs
    with pytest.raises(RuntimeError, match=r"blocks\.2\.mlp\.hook_post"):
        check_model(ours, theirs, max_new_tokens=2)


def test_where_patches_lie_is_seen_without_the_decoder(pair):
    ours, _ = pair
    ours.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    assert parity._geometry(ours).passed


def test_patches_in_another_order_are_found(pair):
    ours, theirs = pair
    encoder = ours.vision_encoder
    conv = encoder.patch_embedding

    class Transposed(torch.nn.Module):
        def forward(self, pixels):
            return conv(pixels).transpose(2, 3)

    encoder.patch_embedding = Transposed()
    failed = _failed(check_model(ours, theirs, max_new_tokens=2))
    assert "patches lie where the picture has them" in failed


GREEDY = "greedy tokens equal Hugging Face's"


def _greedy(checks):
    (check,) = [check for check in checks if check.name == GREEDY]
    return check


def test_greedy_tokens_are_compared_as_the_generation_config_decodes(pair):
    ours, theirs = pair
    theirs.generation_config.repetition_penalty = 1.5
    follows = HookedVLM.from_hf(theirs, ours.processor)
    found = _greedy(check_model(follows, theirs, max_new_tokens=8))
    assert found.passed and "24 tokens in 3 rows, decoding: greedy, repetition_penalty=1.5" in found.figure
    assert not _greedy(check_model(ours, theirs, max_new_tokens=8)).passed, "a plain decoding passes"
    follows.decoding = Decoding({"num_beams": 4})
    refused = _greedy(check_model(follows, theirs, max_new_tokens=8))
    assert not refused.passed and "num_beams=4" in refused.figure


@pytest.fixture
def tied_pair():
    """The same weights twice; the token most likely to follow has a twin of a later id."""
    theirs, ours = random_llava.make_pair()
    ids = ours.prepare(random_llava.make_images(1)[0], "what color is the circle?")
    token = int(theirs(**ids.to_hf()).logits[0, -1].argmax())
    twin = theirs.lm_head.weight.shape[0] - 1
    with torch.no_grad():
        theirs.lm_head.weight[:] *= 0.01
        theirs.lm_head.weight[token] *= 100
        theirs.lm_head.weight[twin] = theirs.lm_head.weight[token]
    theirs.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=3)
    other = deepcopy(theirs)
    return HookedVLM.from_hf(other, ours.processor), theirs, other, twin


def test_a_choice_closer_than_rounding_may_go_either_way(tied_pair):
    ours, theirs, other, twin = tied_pair
    said = []
    for factor in (1 + 1e-6, 1 - 1e-6):  # ours prefers now one of the two, now the other
        with torch.no_grad():
            other.lm_head.weight[twin] = theirs.lm_head.weight[twin] * factor
        found = check_model(ours, theirs, max_new_tokens=6)
        assert _greedy(found).passed and found[0].passed
        said.append(_greedy(found).figure)
    assert any("closer than rounding, and are compared up to there" in figure for figure in said)


def test_a_third_token_at_a_tie_is_wrong(tied_pair):
    ours, theirs, other, twin = tied_pair
    with torch.no_grad():
        other.lm_head.weight[twin - 1] = 2 * theirs.lm_head.weight[twin]
    found = _greedy(check_model(ours, theirs, max_new_tokens=6))
    assert not found.passed and "3 rows differ" in found.figure
