"""Stages of a model in bfloat16 say what its type can't tell, those of one in float32 nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import hones_lens as hl
from hones_lens.analysis import PatchPairs, logit_diff
from hones_lens.hones import NeuronScales, remeasure_heads, side_effects

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4}


@cache
def model(dtype: torch.dtype) -> hl.HookedVLM:
    """tiny-llava in bfloat16, or with the same weights in float32."""
    return hl.HookedVLM.from_pretrained("tiny-llava", dtype=torch.bfloat16).to(dtype)


def pairs(of: hl.HookedVLM) -> PatchPairs:
    return hl.counterfactual(of, hl.counterfactual_pairs("vqa", limit=4), "vqa")


def ends(of: hl.HookedVLM) -> torch.Tensor:
    """The metric of both runs of each pair, [2 pair], of pictures as the model in bfloat16 was given them."""
    prepared = pairs(model(torch.bfloat16))
    with torch.no_grad():
        clean, corrupted = (of(side)[:, -1] for side in (prepared.clean, prepared.corrupted))
    return torch.stack([logit_diff(logits, prepared, clean) for logits in (clean, corrupted)]).double()


@pytest.mark.exhaustive
def test_patching() -> None:
    narrow, wide = model(torch.bfloat16), model(torch.float32)
    expected = 2 * float((ends(narrow) - ends(wide)).abs().mean())
    how: dict[str, Any] = {"layers": [1], "progress": False}
    raw = hl.patch_activations(narrow, pairs(narrow), raw=True, **how).noise
    share = hl.patch_activations(narrow, pairs(narrow), **how).noise
    assert raw is not None and share is not None and raw.n == 4
    assert raw.metric == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    gap = abs(float((ends(narrow)[0] - ends(narrow)[1]).mean()))
    assert share.metric == pytest.approx(expected / gap, rel=1e-2)
    estimated = hl.attribute_patching(narrow, pairs(narrow), raw=True, layers=[1], progress=False)
    assert estimated.noise == raw
    assert hl.patch_activations(wide, pairs(wide), **how).noise is None


@pytest.mark.exhaustive
def test_heads_and_steering() -> None:
    examples = [hl.load_examples("shapes", "vqa", split, limit=6) for split in ("discovery", "test")]
    scales = {"vqa": NeuronScales.uniform([(1, 3), (2, 5)], 2.0)}
    for dtype, known in ((torch.bfloat16, True), (torch.float32, False)):
        of = model(dtype)
        heads = hl.localize_heads(of, "vqa", examples[0], 2, heads=["L1H0", "L3H1", "L2H2"], **QUIET)
        patched = hl.localize_heads(of, "vqa", intervention="patch", pairs=pairs(of), layers=[1], **QUIET)
        effects = side_effects(of, {"vqa": examples[1]}, scales, **QUIET)
        found = [heads.noise, patched.noise, effects.noise.get("vqa")]
        if heads.top():
            found.append(remeasure_heads(of, "vqa", examples[1], heads, draws=0, **QUIET).noise)
        assert [noise is not None and noise.dtype == "bfloat16" for noise in found] == [known] * len(found)


@pytest.mark.exhaustive
def test_knockout() -> None:
    """Of probabilities of whole answers, each given alone; of a patching metric; of the task's own."""
    examples = hl.load_examples("shapes", "vqa", "test", limit=6)
    narrow, wide = model(torch.bfloat16), model(torch.float32)
    prompts = [hl.load_task("vqa").target_prompt(e) for e in examples]
    answers = [hl.load_task("vqa").answer(e) for e in examples]

    def log_probs(of: hl.HookedVLM) -> torch.Tensor:
        own = [of.prepare([e.image], [p], [a]) for e, p, a in zip(examples, prompts, answers, strict=True)]
        with torch.no_grad():
            return torch.cat([of.log_probs(inputs) for inputs in own]).double()

    def noise(of: hl.HookedVLM, metric: str) -> Any:
        how: dict[str, Any] = {"task": "vqa", "metric": metric, "window": 2, "progress": False}
        return hl.attention_knockout(of, examples, [("image", "last")], batch_size=1, **how).noise

    distance = (log_probs(narrow) - log_probs(wide)).abs().mean()
    of_log_prob, relative = noise(narrow, "log_prob"), noise(narrow, "probability")
    assert of_log_prob.metric == pytest.approx(2 * float(distance), rel=0.1) and of_log_prob.n == 6
    p, q = log_probs(narrow).exp(), log_probs(wide).exp()
    expected = 2 * float((p - q).abs().mean() / p.mean())
    assert relative.metric == pytest.approx(expected, rel=0.1) and relative.dtype == "bfloat16"
    assert noise(narrow, "task").n == 6
    assert noise(wide, "probability") is None and noise(wide, "task") is None
