"""Ids without an attention mask: what stands where padding would stand is padding, as in TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import random_llava, random_qwen
from torch import Tensor

from hones_lens import HookedVLM, PatchPairs, VLMInputs, logit_lens, logits_under
from hones_lens.analysis import logits_at_end
from hones_lens.analysis.attention import head_attention
from hones_lens.analysis.token_cells import fold_tokens
from hones_lens.interventions import replace_with_other_heads_mean
from hones_lens.model.padding import find_attention_mask

TEXTS = ["is it red?", "what color is the large circle on the left?"]
MADE = {"llava": random_llava, "qwen": random_qwen}


@dataclass
class Case:
    """A random model twice, and two texts of unequal length as their own ids."""

    made: ModuleType

    def __post_init__(self) -> None:
        self.hf, self.model = self.made.make_pair()
        self.rows = [self.model.to_tokens(text)[0] for text in TEXTS]
        self.pad = self.model.cfg.pad_token_id
        self.eos = self.model.tokenizer.eos_token_id

    def expected(self, ids: Tensor) -> Tensor:
        """Hugging Face's logits of one row, without any padding."""
        self.hf.model.rope_deltas = None
        return self.hf(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0]

    def padded(self, side: str) -> Tensor:
        width = max(map(len, self.rows))
        fill = [torch.full((width - len(row),), self.pad) for row in self.rows]
        pairs = zip(fill, self.rows, strict=True)
        return torch.stack([torch.cat((f, row) if side == "left" else (row, f)) for f, row in pairs])

    def of_row(self, values: Tensor, row: int, side: str) -> Tensor:
        """Values [batch pos …] at the tokens of a row of `padded`."""
        n = len(self.rows[row])
        return values[row, -n:] if side == "left" else values[row, :n]


@pytest.fixture(scope="module", params=MADE)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(MADE[request.param])


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


GIVEN: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda ids: ids,
    "mapping": lambda ids: {"input_ids": ids},
    "mapping with None": lambda ids: {"input_ids": ids, "attention_mask": None},
    "VLMInputs": lambda ids: VLMInputs.from_hf({"input_ids": ids}),
    "rows of VLMInputs": lambda ids: VLMInputs.from_hf({"input_ids": ids})[[0, 1]],
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_attended_to(case: Case, side: str, given: str) -> None:
    model_input = GIVEN[given](case.padded(side))
    for logits in (case.model(model_input), case.model.run_with_cache(model_input)[0]):
        for row, ids in enumerate(case.rows):
            difference = (case.of_row(logits, row, side) - case.expected(ids)).abs().max()
            assert difference <= 5e-5 * max(1.0, float(logits.abs().max())), row


def test_what_to_tokens_returns_is_read_back(case: Case) -> None:
    ids = case.model.to_tokens(TEXTS)
    assert torch.equal(ids, case.padded("left"))
    torch.testing.assert_close(case.model(ids), case.model(TEXTS))
    assert torch.equal(case.model.generate(ids, 4, "tokens"), case.model.generate(TEXTS, 4, "tokens"))
    said = case.hf.generate(input_ids=case.rows[0][None], max_new_tokens=4, do_sample=False)
    assert torch.equal(case.model.generate(ids, 4, "tokens")[0], said[0, len(case.rows[0]) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_leaves_the_padding_out(case: Case, side: str) -> None:
    sums, count = 0.0, 0
    for ids in case.rows:
        log_probs = case.expected(ids).log_softmax(-1)
        sums -= sum(float(log_probs[i - 1, ids[i]]) for i in range(1, len(ids)))
        count += len(ids) - 1
    found = case.model(case.padded(side), return_type="loss")
    assert float(found) == pytest.approx(sums / count, abs=5e-5)


def test_generation_behind_padding_on_the_right_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="row 0 is padded on the right"):
        case.model.generate(case.padded("right"), 2)


def test_a_lens_reads_the_last_token_on_either_side(case: Case) -> None:
    left, right = (logit_lens(case.model, case.padded(side), k=3) for side in ("left", "right"))
    assert torch.equal(left.ids, right.ids)
    places = case.model.as_inputs(case.padded("right")).token_groups["last"].nonzero().tolist()
    assert places == [[row, len(ids) - 1] for row, ids in enumerate(case.rows)]


def test_what_reads_the_last_position_refuses_padding_on_the_right(case: Case) -> None:
    ids = case.padded("right")
    inputs = case.model.as_inputs(ids)
    answers = torch.tensor([5, 6])
    for read in (
        lambda: head_attention(case.model, ids, [(0, 0)]),
        lambda: fold_tokens(case.model, ids),
        lambda: PatchPairs(inputs, inputs, answers, None, ("a", "b")),
        lambda: next(logits_under(case.model, inputs, [[]])),
    ):
        with pytest.raises(ValueError, match="row 0 is padded on the right; pad on the left to"):
            read()


def test_a_residual_stream_gets_the_same_mask(case: Case) -> None:
    ids = case.padded("left")
    resid = case.model(ids, stop_at_layer=1)
    for inputs in (VLMInputs.from_hf({"input_ids": ids}), {"input_ids": ids}):
        assert torch.equal(case.model(resid, start_at_layer=1, inputs=inputs), case.model(ids))


def test_bound_inputs_know_their_padding(case: Case) -> None:
    ids = case.padded("left")
    bound = case.model.bind(ids)
    assert torch.equal(bound(ids), case.model(ids))
    assert [text.strip() for text in bound.texts] == [case.model.to_string(row).strip() for row in case.rows]


def test_images_and_padding(case: Case) -> None:
    """The batch of three rows with pictures, its mask left out."""
    inputs = case.made.mixed_batch(case.model)
    bare = {name: value for name, value in inputs.to_hf().items() if name != "attention_mask"}
    seen = case.model.as_inputs(bare)
    assert torch.equal(seen.attention_mask, inputs.attention_mask)
    assert torch.equal(case.model(bare), case.model(inputs))
    assert torch.equal(case.model.generate(bare, 3, "tokens"), case.model.generate(inputs, 3, "tokens"))


def test_a_mask_that_is_given_is_obeyed(case: Case) -> None:
    """As Hugging Face does: padding tokens under a mask of ones are attended to."""
    ids = case.padded("left")
    case.hf.model.rope_deltas = None
    ones = torch.ones_like(ids)
    expected = case.hf(input_ids=ids, attention_mask=ones).logits
    for given in ({"input_ids": ids, "attention_mask": ones}, VLMInputs(ids, ones)):
        torch.testing.assert_close(case.model(given), expected, atol=5e-5, rtol=5e-5)
    assert (case.model(ids)[0, -1] - expected[0, -1]).abs().max() > 1e-2


def test_padding_tokens_within_a_text_are_text(case: Case) -> None:
    pad = torch.tensor([case.pad])
    row = torch.cat((case.rows[0][:2], pad, pad, case.rows[0][2:]))
    ids = torch.stack((torch.cat((pad, row)), torch.cat((row, pad))))
    logits = case.model(ids)
    for found in (logits[0, 1:], logits[1, :-1]):
        torch.testing.assert_close(found, case.expected(row), atol=5e-5, rtol=5e-5)


def test_a_row_of_padding_alone(case: Case) -> None:
    ids = case.padded("left")
    ids[1] = case.pad
    with pytest.raises(ValueError, match="row 1 of the tokens is padding alone; pass a mapping with"):
        case.model(ids)


def test_groups_of_unseen_inputs_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"which tokens are padding .* use model\.as_inputs"):
        _ = VLMInputs.from_hf({"input_ids": case.padded("left")}).token_groups


# -- padding tokens that are something else too -----------------------------------------------------


class Stub:
    """A model with the special tokens 1 to 3, as far as padding goes."""

    def __init__(self, pad: int, eos: tuple[int, ...] = (2,), bos: int | None = 1, *, processor: bool = True):
        self.processor = None
        self.cfg = SimpleNamespace(pad_token_id=pad, eos_token_ids=eos)
        if processor:
            tokenizer = SimpleNamespace(
                bos_token_id=bos,
                eos_token_id=eos[0],
                pad_token_id=None,
                all_special_ids=[1, 2, 3],
                added_tokens_decoder={},
            )
            self.processor = SimpleNamespace(tokenizer=tokenizer)


# The padding token, the special ones, the ids, and the mask; or the words of the refusal.
EDGES = {
    "a token of its own": (Stub(3), [[3, 3, 1, 5], [1, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    "on both sides": (Stub(3), [[3, 5, 6, 3], [5, 6, 7, 8]], [[0, 1, 1, 0], [1, 1, 1, 1]]),
    "ends texts, stands on the left": (Stub(2), [[2, 2, 1, 5], [1, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    "ends every text": (Stub(2), [[2, 1, 5, 2], [1, 5, 6, 2]], [[0, 1, 1, 1], [1, 1, 1, 1]]),
    "ends one text": (Stub(2), [[1, 5, 2]], [[1, 1, 1]]),
    "ends texts or pads": (Stub(2), [[1, 5, 2], [1, 5, 6]], "row 0 ends in 1 of token 2"),
    "ends texts and pads": (Stub(2), [[1, 5, 2, 2], [1, 5, 6, 2]], "row 0 ends in 2 of token 2"),
    "ends generations, not texts": (
        Stub(3, eos=(2, 3)),
        [[1, 5, 2, 3], [1, 5, 6, 2]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ),
    "begins texts": (Stub(1), [[1, 1, 5, 6], [1, 5, 6, 7]], [[0, 1, 1, 1], [1, 1, 1, 1]]),
    "begins texts, left out": (Stub(1), [[1, 1, 5, 6], [4, 5, 6, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
    "begins a text alone": (Stub(1), [[1]], [[1]]),
    "begins texts, a row by itself": (Stub(1), [[1, 1, 5, 6]], "every row begins in 2 or more tokens 1"),
    "a word": (Stub(5), [[5, 5, 1, 6], [1, 5, 6, 7]], "row 0 begins or ends in token 5, which is a word"),
    "a word within": (Stub(5), [[1, 5, 5, 6]], [[1, 1, 1, 1]]),
    "none named, no tokenizer": (
        Stub(0, eos=(), processor=False),
        [[0, 5, 6]],
        "row 0 begins or ends in token 0",
    ),
    "no tokenizer": (Stub(3, processor=False), [[3, 1, 5]], [[0, 1, 1]]),
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", EDGES)
def test_padding_that_is_another_token_too(name: str) -> None:
    model, ids, expected = EDGES[name]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            find_attention_mask(model, torch.tensor(ids))
    else:
        assert find_attention_mask(model, torch.tensor(ids)).tolist() == expected


def test_a_model_without_processor_finds_its_padding() -> None:
    hf, model = random_llava.make_pair()
    bare = HookedVLM.from_hf(hf)
    ids = model.to_tokens(TEXTS)
    torch.testing.assert_close(bare(ids), model(TEXTS))


def test_the_tokenizers_own_padding_token_counts_too() -> None:
    """A checkpoint may name one for generation and its tokenizer another."""
    hf, _ = random_llava.make_pair()
    hf.generation_config.pad_token_id = 2
    model = HookedVLM.from_hf(hf, random_llava.processor_for(hf.config))
    assert model.cfg.pad_token_id != model.tokenizer.pad_token_id
    tokenizer = model.tokenizer
    made = tokenizer(TEXTS, padding=True, padding_side="left", return_tensors="pt")
    assert made.attention_mask[0, 0] == 0
    assert torch.equal(model.as_inputs(made.input_ids).attention_mask, made.attention_mask)


def test_edits_of_the_last_position_refuse_padding_on_the_right(case: Case) -> None:
    hook = replace_with_other_heads_mean(0, 1, positions="last")
    message = (
        r"row 0 is padded on the right; pad on the left to edit the last position at blocks\.0\.attn\.hook_z"
    )
    with pytest.raises(ValueError, match=message):
        case.model.run_with_hooks(case.padded("right"), fwd_hooks=[hook])
    with pytest.raises(ValueError, match="padded on the right; pad on the left to read the last position"):
        logits_at_end(case.model, case.model.as_inputs(case.padded("right")))
    padded = case.model.run_with_hooks(case.padded("left"), fwd_hooks=[hook], logits_to_keep=1)
    alone = case.model.run_with_hooks(case.rows[0][None], fwd_hooks=[hook], logits_to_keep=1)
    assert (padded[0] - alone[0]).abs().max() < 5e-5
