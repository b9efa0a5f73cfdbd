"""What the model answers unpatched: counted, noted in every kind of patching, and warned about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import hones_lens as hl
from hones_lens.analysis.knockout import attention_knockout
from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.gradient import attribute_patching
from hones_lens.analysis.patching.pair_answers import PairAnswers, pair_answers
from hones_lens.analysis.patching.pairs import PatchPairs, corrupted_by, counterfactual
from hones_lens.analysis.patching.path import path_patching, path_patching_matrix
from hones_lens.hones import localize_heads
from hones_lens.interventions.corruptions import blank
from hones_lens.model.loading import load_hf_model

ONE_LAYER = {"layers": [1], "progress": False}
KINDS: dict[str, Callable] = {
    "activation": lambda model, pairs: patch_activations(model, pairs, **ONE_LAYER),
    "gradient": lambda model, pairs: attribute_patching(model, pairs, "z", **ONE_LAYER),
    "path": lambda model, pairs: path_patching(model, pairs, [(1, 2)], progress=False),
    "knockout": lambda model, pairs: attention_knockout(model, pairs, [("image", "last")], progress=False),
    "matrix": lambda model, pairs: path_patching_matrix(model, pairs, [(1, 2)], progress=False),
}


@pytest.fixture(scope="module")
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


def pairs_of(model: hl.HookedVLM, wrapped: bool) -> PatchPairs:
    """Six counterfactual pairs, asked in the task's form, or with the question alone."""
    drawn = hl.counterfactual_pairs("vqa", limit=6)
    if wrapped:
        return counterfactual(model, drawn, "vqa")
    sides = [
        model.prepare([getattr(pair, side).image for pair in drawn], [pair.clean.question for pair in drawn])
        for side in ("clean", "corrupted")
    ]
    answer, foil = (
        torch.tensor([model.continuation(pair.clean.question, pair.answers[i])[0] for pair in drawn])
        for i in (0, 1)
    )
    return PatchPairs(*sides, answer, foil, tuple(p.clean.id for p in drawn), tuple(drawn), "vqa")


@torch.no_grad()
def hf_logits(pairs: PatchPairs) -> list[torch.Tensor]:
    """The next token's logits of Hugging Face's own model, clean and corrupted."""
    hf_model = load_hf_model("tiny-llava")[0]
    return [hf_model(**side.to_hf()).logits[:, -1] for side in (pairs.clean, pairs.corrupted)]


@pytest.mark.parametrize("wrapped", [True, False])
def test_margins_and_right_answers_are_those_of_hugging_faces_model(
    model: hl.HookedVLM, wrapped: bool
) -> None:
    pairs = pairs_of(model, wrapped)
    assert pairs.foil is not None
    found, logits = pair_answers(model, pairs, batch_size=4), hf_logits(pairs)
    for side, mine in zip(logits, (found.clean, found.corrupted), strict=True):
        theirs = [float(row[a] - row[f]) for row, a, f in zip(side, pairs.answer, pairs.foil, strict=True)]
        assert mine.tolist() == pytest.approx(theirs, abs=1e-3)
    right = (logits[0].argmax(-1) == pairs.answer) & (logits[1].argmax(-1) == pairs.foil)
    assert torch.equal(found.right, right) and bool(right.all()) == wrapped
    prefers = int((found.clean > 0).sum())
    assert f"right in {int(right.sum())} of 6 pairs; " in str(found)
    assert str(found).endswith(f"the clean run prefers the answer to the foil in {prefers}")


def test_a_pair_is_right_only_where_the_corrupted_run_answers_the_foil(model: hl.HookedVLM) -> None:
    pairs = pairs_of(model, wrapped=True)
    same = replace(pairs, corrupted=pairs.clean)
    assert not pair_answers(model, same).right.any()
    assert pair_answers(model, replace(same, facts=())).right.all()


def test_half_of_the_pairs_are_not_enough() -> None:
    def told(*margins: float) -> PairAnswers:
        clean = torch.tensor(margins, dtype=torch.float64)
        return PairAnswers(clean, -clean, clean > 0, has_foil=True)

    assert told(1, -1).problem and not told(1, 1, -1).problem


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_patching_notes_the_share_and_warns(model: hl.HookedVLM, kind: str) -> None:
    """That no warning comes where all is right is pytest's doing: there a warning is an error."""
    right, wrong = pairs_of(model, wrapped=True), pairs_of(model, wrapped=False)
    assert str(pair_answers(model, right)) in KINDS[kind](model, right).notes
    found = pair_answers(model, wrong)
    share = f"{100 * float(found.right.double().mean()):.0f} % right"
    with pytest.warns(UserWarning, match=share):
        result = KINDS[kind](model, wrong)
    assert str(found) in result.notes


def test_localizing_by_patching_warns_too(model: hl.HookedVLM) -> None:
    wrong = pairs_of(model, wrapped=False)
    with pytest.warns(UserWarning, match="the model answers right in"):
        localize_heads(model, "vqa", pairs=wrong, intervention="patch", progress=False)


def test_without_a_foil_the_answer_competes_with_all_tokens(model: hl.HookedVLM) -> None:
    pairs = pairs_of(model, wrapped=True)
    alone = corrupted_by(model, pairs.clean, blank(), pairs.answer)
    found, logits = pair_answers(model, alone), hf_logits(alone)[0]
    best = logits.scatter(1, alone.answer[:, None], -torch.inf).amax(-1)
    theirs = logits.gather(1, alone.answer[:, None])[:, 0] - best
    assert torch.allclose(found.clean.float(), theirs, atol=1e-3)
    assert str(found) == "the model answers right in 6 of 6 pairs" and not found.problem
    assert pairs.foil is not None
    swapped = pair_answers(model, corrupted_by(model, pairs.clean, blank(), pairs.foil))
    assert "0 of 6" in swapped.problem
