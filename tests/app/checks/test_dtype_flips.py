"""What changes in fewer bits, counted against a loop over heads and examples."""

from __future__ import annotations

import pytest
import torch

import hones_lens as hl
from hones_lens import HookedVLM
from hones_lens.app.checks.dtype_flips import dtype_flips
from hones_lens.hones.attribution.head_scores import all_heads
from hones_lens.interventions.hooks import replace_with_other_heads_mean


def _said(model: HookedVLM, examples: list) -> tuple[list[str], list[float]]:
    """The clean answers, then every head's, one generation at a time."""
    task, texts, scores = hl.load_task("ocr"), [], []
    for hooks in [[], *([replace_with_other_heads_mean(*cell)] for cell in all_heads(model))]:
        for example in examples:
            with model.hooks(fwd_hooks=hooks):
                inputs = model.prepare(example.image, task.prompts(example)[0])
                texts += model.generate(inputs, max_new_tokens=24)
            scores.append(task.score(texts[-1], example))
    return texts, scores


@pytest.mark.exhaustive
def test_flips_are_those_of_a_loop() -> None:
    # In float64, so that no batch rounds otherwise than another; with the weights' errors of bfloat16.
    models = [HookedVLM.from_pretrained("tiny-llava", dtype=t) for t in (torch.float32, torch.float64)]
    for weight in models[1].parameters():
        weight.data = weight.data.bfloat16().double()
    examples = hl.load_examples("shapes-shifted", "ocr", "dev", limit=4)  # the model is less sure there
    found = dtype_flips(*models, "ocr", examples)
    (exact, scores), (rounded, rounded_scores) = (_said(model, examples) for model in models)
    n = len(examples)
    assert found.cells == 32 * n and found.dtype == "float64" and found.n == n
    assert found.clean == sum(a != b for a, b in zip(exact[:n], rounded[:n], strict=True))
    differing = sum(a != b for a, b in zip(exact[n:], rounded[n:], strict=True))
    assert found.answers == differing
    drops = [[s[i % n] - s[n + i] for i in range(32 * n)] for s in (scores, rounded_scores)]
    moved = sum(abs(a - b) > 1e-9 for a, b in zip(*drops, strict=True))
    assert found.drops == moved
    assert found.answers > 0
    means = [torch.tensor(d).view(32, n).mean(1) for d in drops]
    shared = [{i for i in m.argsort(descending=True, stable=True)[:5].tolist() if m[i] > 0} for m in means]
    assert (found.top_k, found.shared) == (len(shared[0]), len(shared[0] & shared[1]))
    ranks = [(m[:, None] > m).sum(1) + (m[:, None] == m).sum(1) / 2 for m in means]
    assert found.rank_correlation == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]))


def test_the_first_model_is_in_float32() -> None:
    model = HookedVLM.from_pretrained("tiny-llava")
    with pytest.raises(ValueError, match=r"torch.float32 and torch.float32"):
        dtype_flips(model, model, "ocr", hl.load_examples("shapes", "ocr", "dev", limit=1))
