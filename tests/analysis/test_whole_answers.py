"""Answers in LLaMA's true vocabulary, where numbers, CJK and signs begin with a bare ▁."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_llava, true_vocabularies
from PIL import Image
from torch import Tensor

from hones_lens import VLMInputs, attention_knockout, direct_logit_attribution, patch_activations
from hones_lens.analysis import attribute_patching, corrupted_by, image_token_lens, path_patching
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.app.explorer import page
from hones_lens.app.explorer.compute import AnsweredPrompt
from hones_lens.app.explorer.views import ExplorerViews
from hones_lens.app.runs.patch import PairsChoice
from hones_lens.interventions.corruptions import blank
from hones_lens.model.tokens import leading_blanks

pytestmark = [pytest.mark.network]
QUESTION = "how many circles are there?"
# What the tokenizer makes of each behind `ASSISTANT:`, by LLaMA's published vocabulary.
PIECES = {"7": ["▁", "7"], "2": ["▁", "2"], "東京": ["▁", "東", "京"], "½": ["▁", "½"], "Yes": ["▁Yes"]}
SPACE = 29871


def pictures(n: int) -> list[Image.Image]:
    return random_llava.make_images(n, size=(40, 31))


@torch.no_grad()
def hf_log_probs(inputs: VLMInputs) -> Tensor:
    """Log-probability of each row's whole answer by Hugging Face's model, each row alone."""
    hf, values = true_vocabularies.llava()[0], []
    assert inputs.answer_mask is not None
    for row in range(len(inputs)):
        one = inputs[row].without_padding()
        assert one.answer_mask is not None
        logits = hf(**one.to_hf()).logits[0].log_softmax(-1)
        places = one.answer_mask[0].nonzero()[:, 0]
        values.append(logits[places - 1, one.input_ids[0, places]].sum())
    return torch.stack(values)


def pairs_of(answers: list[str], foils: list[str] | None = None) -> tuple[PatchPairs, VLMInputs, VLMInputs]:
    """Pairs under grey pictures, and prompts with answers: clean and corrupted."""
    model, images = true_vocabularies.llava()[1], pictures(len(answers))
    prompts = model.prepare(images, [QUESTION] * len(answers))
    ids, others = (
        None if texts is None else [model.continuation(QUESTION, text) for text in texts]
        for texts in (answers, foils)
    )
    assert ids is not None
    pairs = corrupted_by(model, prompts, blank(), ids, others)
    grey = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
    sides = (model.prepare(seen, [QUESTION] * len(answers), answers) for seen in (images, grey))
    return pairs, *sides


def test_the_token_that_tells_an_answer_apart() -> None:
    tokenizer, model = true_vocabularies.llava()[1].tokenizer, true_vocabularies.llava()[1]
    for answer, pieces in PIECES.items():
        ids = model.continuation(QUESTION, answer)
        assert tokenizer.convert_ids_to_tokens(ids) == pieces
        assert leading_blanks(model, ids) == pieces.count("▁")
        if len(pieces) - pieces.count("▁") == 1:
            assert model.to_single_token(answer) == ids[-1]
    with pytest.raises(ValueError, match=r"'東京' is 2 tokens: \['東', '京'\]"):
        model.to_single_token("東京")
    with pytest.raises(ValueError, match=r"' 7' is 2 tokens"):
        model.to_single_token(" 7")


def test_patching_measures_the_whole_answer() -> None:
    """Both runs of each pair, and a patch of all positions, by Hugging Face's log-probabilities."""
    model, answers = true_vocabularies.llava()[1], list(PIECES)
    pairs, clean, corrupted = pairs_of(answers)
    assert model.tokenizer.convert_ids_to_tokens(pairs.answer.tolist()) == ["7", "2", "東", "½", "▁Yes"]
    assert pairs.foil is None and pairs.shared == (1, 1, 1, 1, 0)
    gap = hf_log_probs(clean) - hf_log_probs(corrupted)
    options: dict[str, Any] = {"metric": "log_prob", "progress": False, "by_pair": True, "batch_size": 2}
    for what, layer in (("resid_pre", 0), ("resid_post", 2)):
        found = patch_activations(model, pairs, what, "all", layers=[layer], **options)
        assert found.values.flatten().tolist() == pytest.approx(gap.tolist(), abs=1e-4)
    assert "tokens of the answers: ▁ 7, ▁ 2, ▁ 東 京, and 2 more" in found.notes
    raw = patch_activations(model, pairs, layers=[0], metric="log_prob", raw=True, progress=False)
    mean = float(hf_log_probs(clean).mean()), float(hf_log_probs(corrupted).mean())
    assert raw.notes[0] == f"log_prob: clean {mean[0]:.4g}, corrupted {mean[1]:.4g}"


@pytest.mark.exhaustive
def test_gradients_and_paths_measure_the_whole_answer() -> None:
    model = true_vocabularies.llava()[1]
    pairs, clean, corrupted = pairs_of(["7", "東京"])
    gap = float((hf_log_probs(clean) - hf_log_probs(corrupted)).mean())
    options: dict[str, Any] = {"metric": "log_prob", "progress": False, "raw": True}
    summed = attribute_patching(model, pairs, "resid_pre", layers=[0], method="ig", steps=200, **options)
    assert float(summed.values.sum()) == pytest.approx(gap, rel=0.02)
    for found in (summed, path_patching(model, pairs, [(0, 1)], **options)):
        assert any(f"clean − corrupted is {gap:.3g}"[:-1] in note for note in found.notes)
        assert "tokens of the answers: ▁ 7, ▁ 東 京" in found.notes


def test_knockout_measures_the_whole_answer() -> None:
    """Nothing cut: the mean probability is Hugging Face's; every number has its own."""
    model = true_vocabularies.llava()[1]
    clean = model.prepare(pictures(4), [QUESTION] * 4, ["7", "2", "東京", "½"])
    p = hf_log_probs(clean)
    assert p[0] != p[1]
    found = attention_knockout(model, clean, [("image", "last")], metric="log_prob", progress=False)
    assert f"{float(p.mean()):.4g}" in found.notes[0]
    assert "tokens of the answers: ▁ 7, ▁ 2, ▁ 東 京, and 1 more" in found.notes
    kl = attention_knockout(model, clean, [("image", "last")], metric="kl", progress=False)
    assert "tokens of the answers: 7 behind ▁, 2 behind ▁, 東 behind ▁, and 1 more" in kl.notes


def test_differences_are_of_the_tokens_that_differ() -> None:
    model = true_vocabularies.llava()[1]
    pairs, *_ = pairs_of(["12", "7"], ["17", "2"])
    assert pairs.foil is not None
    assert model.tokenizer.convert_ids_to_tokens(pairs.answer.tolist()) == ["2", "7"]
    assert model.tokenizer.convert_ids_to_tokens(pairs.foil.tolist()) == ["7", "2"]
    found = patch_activations(model, pairs, layers=[0], progress=False)
    assert "tokens of the answers: 2 against 7 behind ▁ 1, 7 against 2 behind ▁" in found.notes
    (one,) = model.tokenizer.convert_tokens_to_ids(["7"])
    prompts = model.prepare(pictures(1), [QUESTION])
    for texts, ids, said in (
        (("7",), (one,), "'7' is token 7, 1 of 1."),
        (("17", "12"), model.tokenizer.convert_tokens_to_ids(["7", "2"]), "'17' is token 7, 2 of 2"),
        (("東京",), model.tokenizer.convert_tokens_to_ids(["東"]), "'東京' is token 東, 1 of 2."),
    ):
        attributed = direct_logit_attribution(model, prompts, *texts)
        assert torch.equal(attributed.values, direct_logit_attribution(model, prompts, *ids).values)
        assert said in attributed.notes[-1]
    assert "'7'" in image_token_lens(model, prompts, "7").what


def test_a_run_on_the_users_picture(tmp_path: Any) -> None:
    model = true_vocabularies.llava()[1]
    pictures(1)[0].save(tmp_path / "it.png")
    asked: dict[str, Any] = {"image": str(tmp_path / "it.png"), "prompt": QUESTION, "corrupt": "blank"}
    alone = PairsChoice(**asked, answer="7").load(model)
    assert (alone.answer.tolist(), alone.foil) == (model.tokenizer.convert_tokens_to_ids(["7"]), None)
    assert alone.answer_ids == (tuple(model.continuation(QUESTION, "7")),)
    against = PairsChoice(**asked, answer="7", foil="2").load(model)
    assert against.foil is not None and against.foil.tolist() == model.tokenizer.convert_tokens_to_ids(["2"])
    other = tmp_path / "other.png"
    pictures(2)[1].save(other)
    swapped = PairsChoice(**{**asked, "corrupt": None}, corrupted_image=str(other), answer="7").load(model)
    assert torch.equal(swapped.answer, alone.answer) and swapped.answer_ids == alone.answer_ids


def test_the_explorer_starts_at_the_token_that_tells_the_answer() -> None:
    model, image = true_vocabularies.llava()[1], pictures(1)[0]
    views = ExplorerViews(model, image, QUESTION, max_new_tokens=2)
    answered = model.prepare(image, QUESTION, "7")
    assert answered.answer_mask is not None
    prompt, ids = answered.before_answers(), answered.input_ids[:, answered.answer_mask[0]]
    assert ids[0, 0] == SPACE
    views.answered = AnsweredPrompt(
        model.with_image_embeds(model.as_inputs(prompt)), ids[0], prompt.extended(ids[:, :-1])
    )
    views._passes, views._texts = {}, {(): "7"}
    state = views.start()
    assert state.token == views.answered.last_prompt_position + 1
    views.base = views.activations((), state.token).log_probs
    p = 100 * float(hf_log_probs(answered).exp())
    assert f"<th>probability of “7”</th><td>{p:.2f} %</td>" in page.static_html(views, state)
    assert views.readable(SPACE) == "▁"
