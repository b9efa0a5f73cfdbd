"""A model bound to pictures: tokens alone give what Hugging Face's model gives for them and the pictures."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from types import ModuleType

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.head_detector import detect_head
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

from hones_lens import VLMInputs

TOLERANCE = 5e-5
PROMPT = "is the red circle on the red one?"


class Case(Twin):
    """A batch of three rows (a picture, two, none), padded on the left, and a row of its own."""

    def __init__(self, made: ModuleType):
        super().__init__(made, seed=4, text={"num_key_value_heads": 2})
        self.inputs: VLMInputs = made.mixed_batch(self.model)
        self.bound, self.tokens = self.model.bind(self.inputs), self.inputs.input_ids
        self.one = self.model.prepare(random_llava.make_images(1, 5)[0], PROMPT)

    def other_words(self, inputs: VLMInputs) -> Tensor:
        """The tokens with the second word of every question exchanged."""
        ids = inputs.input_ids.clone()
        for row, asked in enumerate(inputs.question_mask):
            place = asked.nonzero()[1, 0]
            ids[row, place] = 20 + (ids[row, place] + 1) % 100
        return ids

    def theirs(self, inputs: VLMInputs, tokens: Tensor) -> Tensor:
        """Hugging Face's logits for these tokens and the pictures of these inputs."""
        return self.logits(replace(inputs, input_ids=tokens))

    def difference(self, a: Tensor, b: Tensor) -> float:
        return random_llava.largest_difference(a, b, self.inputs)


@pytest.fixture(scope="module", params=[random_llava, random_qwen], ids=["llava", "qwen"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def double(x: Tensor, hook) -> Tensor:
    return x * 2


DOUBLED = [("blocks.1.attn.hook_z", double)]


# -- what runs -----------------------------------------------------------------------------------


def test_tokens_alone_give_the_logits_of_pictures_and_tokens(case: Case) -> None:
    actual = case.bound(case.tokens)
    assert torch.equal(actual, case.model(case.inputs)) and torch.equal(
        actual, case.bound.forward(case.tokens)
    )
    assert case.difference(actual, case.theirs(case.inputs, case.tokens)) <= TOLERANCE
    mirrored = replace(case.inputs, pixel_values=case.inputs.pixel_values.flip(-1))
    other = case.model.bind(mirrored)(case.tokens)
    change = (other - actual)[:, -1].abs().amax(-1)
    assert (change[:2] > 1e-3).all() and change[2] == 0, "two rows have pictures"


def test_another_text_on_the_same_pictures(case: Case) -> None:
    tokens = case.other_words(case.inputs)
    actual = case.bound(tokens)
    assert case.difference(actual, case.theirs(case.inputs, tokens)) <= TOLERANCE
    assert ((actual - case.bound(case.tokens))[:, -1].abs().amax(-1) > 1e-3).all()
    assert torch.equal(case.bound.tokens, case.tokens), "the binding is as it was"


def test_one_picture_serves_several_texts(case: Case) -> None:
    bound = case.model.bind(case.one)
    tokens = torch.cat((case.one.input_ids, case.other_words(case.one), case.one.input_ids))
    actual = bound(tokens)
    for row in range(3):
        expected = case.theirs(case.one, tokens[row : row + 1])[0]
        assert (actual[row] - expected).abs().max() <= TOLERANCE
    assert (actual[0] - actual[1]).abs().max() > 1e-3
    assert torch.equal(bound(tokens[0]), bound(tokens[:1])), "a row without its batch axis"


def test_what_may_be_bound(case: Case) -> None:
    """What `as_inputs` takes; images that are encoded already; text alone."""
    expected = case.bound(case.tokens)
    for inputs in (case.inputs.to_hf(), case.model.with_image_embeds(case.inputs)):
        assert case.difference(case.model.bind(inputs)(case.tokens), expected) <= TOLERANCE
    text = case.model.to_tokens("is it red?")
    other = case.model.to_tokens("is it blue?")
    assert torch.equal(case.model.bind(text)(other), case.model(other))


def test_hooks_and_caches(case: Case) -> None:
    bound, tokens = case.bound, case.tokens
    expected = case.logits(case.inputs, case.edit(1, "attn.hook_z", lambda z: z * 2))
    actual = bound.run_with_hooks(tokens, fwd_hooks=DOUBLED)
    assert case.difference(actual, expected) <= TOLERANCE
    assert case.difference(actual, bound(tokens)) > 1e-2
    with bound.hooks(fwd_hooks=DOUBLED) as hooked:
        assert hooked is bound and torch.equal(hooked(tokens), actual)
    bound.add_hook(*DOUBLED[0])
    try:
        assert torch.equal(bound(tokens), actual) and torch.equal(case.model(case.inputs), actual)
    finally:
        bound.reset_hooks()
    logits, cache = bound.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    assert isinstance(cache, ActivationCache) and torch.equal(logits, bound(tokens))
    theirs = case.seen(case.inputs)
    real = case.inputs.attention_mask.bool()
    for layer, part in itertools.product(range(3), ("resid_pre", "resid_mid", "resid_post")):
        difference = cache[part, layer] - theirs[f"blocks.{layer}.hook_{part}"]
        assert difference[real].abs().max() <= TOLERANCE


def test_layers_and_losses(case: Case) -> None:
    bound, tokens = case.bound, case.tokens
    resid = bound(tokens, stop_at_layer=1)
    assert torch.equal(bound(resid, start_at_layer=1), bound(tokens))
    edited = bound.run_with_hooks(resid, start_at_layer=1, fwd_hooks=DOUBLED)
    assert torch.equal(edited, bound.run_with_hooks(tokens, fwd_hooks=DOUBLED))
    logits, cache = bound.run_with_cache(resid, start_at_layer=1, names_filter=lambda n: "resid" in n)
    assert torch.equal(logits, bound(tokens)) and "blocks.0.hook_resid_pre" not in cache
    single = case.model.bind(case.one)
    both = single(case.one.input_ids.expand(2, -1), stop_at_layer=1)
    together, alone = single(both, start_at_layer=1), single(both[1:], start_at_layer=1)
    assert (together[1] - alone[0]).abs().max() <= TOLERANCE
    assert torch.equal(bound(tokens, return_type="loss"), case.model(case.inputs, return_type="loss"))


def test_generation(case: Case) -> None:
    for tokens in (case.tokens, case.other_words(case.inputs)):
        case.hf.model.rope_deltas = None
        given = {**case.inputs.to_hf(), "input_ids": tokens}
        expected = case.hf.generate(**given, max_new_tokens=4, do_sample=False)[:, tokens.shape[1] :]
        assert torch.equal(case.bound.generate(tokens, 4, "tokens"), expected)
    assert case.bound.generate(max_new_tokens=3) == case.model.generate(case.inputs, 3)


def test_all_else_is_the_models(case: Case) -> None:
    bound, model = case.bound, case.model
    assert bound.cfg is model.cfg and bound.blocks is model.blocks and bound.hook_dict is model.hook_dict
    assert bound.tokenizer is model.tokenizer and bound.to_single_token("red") == model.to_single_token("red")
    assert torch.equal(bound.W_Q, model.W_Q) and torch.equal(bound.W_U, model.W_U)
    assert isinstance(bound, TransformerLensModel) and isinstance(bound, TransformerLensModelWithWeights)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = bound.no_such_thing
    with pytest.raises(FrozenInstanceError):
        bound.cfg = None
    assert torch.equal(copy.copy(bound)(case.tokens), bound(case.tokens))
    assert f"bound to 3 × {case.tokens.shape[1]} tokens and 3 images" in repr(bound)


# -- what is refused -----------------------------------------------------------------------------


def test_tokens_that_do_not_fit(case: Case) -> None:
    bound, tokens = case.bound, case.tokens
    image = case.inputs.image_mask
    shape = tuple(tokens.shape)
    for wrong in (tokens[:2], tokens[:, 1:], torch.cat((tokens, tokens)), tokens[0]):
        with pytest.raises(
            ValueError, match=rf"tokens of the shape .* bound with \({shape[0]}, {shape[1]}\)"
        ):
            bound(wrong)
    with pytest.raises(
        ValueError, match=rf"row 0 has 0 image tokens; the bound inputs have {image[0].sum()}"
    ):
        bound(tokens.masked_fill(image, 21))
    moved = tokens.clone()
    moved[1] = moved[1].roll(1)
    with pytest.raises(ValueError, match=r"row 1 has \d+ image tokens.* not all in the same places"):
        bound(moved)
    padded = int((case.inputs.attention_mask == 0).sum(-1).argmax())
    filled = tokens.clone()
    filled[padded, 0] = 21
    with pytest.raises(ValueError, match=rf"row {padded} has tokens where the bound inputs have padding"):
        bound(filled)
    shorter = tokens.clone()
    shorter[padded, int((case.inputs.attention_mask[padded] == 0).sum())] = case.model.cfg.pad_token_id
    with pytest.raises(ValueError, match=rf"row {padded} has padding where the bound inputs have tokens"):
        bound(shorter)


def test_what_is_not_tokens(case: Case) -> None:
    for wrong in (case.inputs, case.inputs.to_hf(), case.model(case.inputs, stop_at_layer=1), None):
        with pytest.raises(TypeError, match=r"a bound model takes tokens \[batch pos\]"):
            case.bound(wrong)


def test_the_bare_model_refuses_image_tokens_without_pictures(case: Case) -> None:
    n = int(case.inputs.image_mask.sum())
    for run in (case.model, case.model.run_with_hooks, case.model.run_with_cache, case.model.generate):
        with pytest.raises(ValueError, match=rf"{n} image tokens in input_ids, .* 0 images"):
            run(case.tokens)


# -- text ----------------------------------------------------------------------------------------


def test_a_bound_prompt_has_the_bound_tokens(case: Case) -> None:
    bound = case.model.bind(case.one)
    assert torch.equal(bound.to_tokens(PROMPT), case.one.input_ids)
    assert torch.equal(bound.to_tokens(bound.texts), case.one.input_ids)
    assert bound.texts[0].count(case.model.image_token) == int(case.one.image_mask.sum())
    assert torch.equal(bound(PROMPT), bound(case.one.input_ids))
    assert torch.equal(case.bound.to_tokens(list(random_llava.QUESTIONS)), case.tokens)
    for text in ("is it red?", random_llava.QUESTIONS[0], list(random_llava.QUESTIONS[::-1])):
        assert torch.equal(case.bound.to_tokens(text), case.model.to_tokens(text)), "not what is bound"
    assert torch.equal(bound.to_tokens(" red", prepend_bos=False), case.model.to_tokens(" red", False))


def previous(tokens: list[int], query: int, key: int) -> bool:
    return key == query - 1


def duplicate(tokens: list[int], query: int, key: int) -> bool:
    return key < query and tokens[key] == tokens[query]


def induction(tokens: list[int], query: int, key: int) -> bool:
    """What came behind an earlier copy of this token."""
    return 0 < key <= query and tokens[key - 1] == tokens[query]


@pytest.mark.parametrize("name", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_heads_are_detected_on_a_picture(case: Case, name: str) -> None:
    """By hand from Hugging Face's attentions: the share of a head's attention in the places looked for."""
    wanted = {"previous": previous, "duplicate": duplicate, "induction": induction}[name.split("_")[0]]
    tokens = case.one.input_ids[0].tolist()
    patterns = [layer[0] for layer in case.attentions(case.one)]
    bound = case.model.bind(case.one)
    actual = detect_head(bound, PROMPT, name)
    without = detect_head(bound, PROMPT, name, exclude_bos=True, exclude_current_token=True)
    assert actual.shape == (3, 4)
    for layer, head in itertools.product(range(3), range(4)):
        pattern, at = patterns[layer][head].tolist(), range(len(tokens))
        places = [(q, k) for q in at for k in at if k <= q]
        kept = [(q, k) for q, k in places if 0 < k < q]
        for scores, among in ((actual, places), (without, kept)):
            hit = sum(pattern[q][k] for q, k in among if wanted(tokens, q, k))
            expected = hit / sum(pattern[q][k] for q, k in among)
            assert scores[layer, head].item() == pytest.approx(expected, abs=1e-5)
    assert actual.std() > 1e-3


def test_chosen_heads_and_a_pattern_of_ones_own(case: Case) -> None:
    bound, n = case.model.bind(case.one), case.one.input_ids.shape[1]
    to_image = case.one.image_mask.float().expand(n, n).tril()
    to_image[0, 0] = 0.5  # so that the pattern is more than zeros and ones
    actual = detect_head(bound, PROMPT, to_image, heads=[(0, 1), (2, 3)], error_measure="abs")
    patterns = case.attentions(case.one)
    for layer, head in itertools.product(range(3), range(4)):
        error = (patterns[layer][0, head] - to_image).abs().sum() / n
        expected = 1 - error.item() if (layer, head) in ((0, 1), (2, 3)) else -1
        assert actual[layer, head].item() == pytest.approx(expected, abs=6e-4), "rounded to three places"


def test_white_space_at_the_ends_makes_another_text(case: Case) -> None:
    bound = case.model.bind(case.one)
    (text,) = bound.texts
    assert torch.equal(bound.to_tokens(PROMPT), bound.tokens)
    assert torch.equal(bound.to_tokens(text), bound.tokens)
    for other in (f"{PROMPT} ", f" {PROMPT}", f"{text}\n"):
        with pytest.raises(ValueError, match="differ in white space at their ends alone"):
            bound.to_tokens(other)
