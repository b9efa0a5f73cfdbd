"""Every key that Hugging Face's forward reads is honoured as it does, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import random_llava, random_qwen
from torch import Tensor

from hones_lens import HookedVLM, VLMInputs

MADE = {"llava": random_llava, "qwen": random_qwen}
HONOURED = {
    "llava": {"input_ids", "attention_mask", "position_ids", "labels", "pixel_values"},
    "qwen": {
        "input_ids",
        "attention_mask",
        "position_ids",
        "labels",
        "pixel_values",
        "image_grid_thw",
        "mm_token_type_ids",
    },
}
OPTIONS = {"logits_to_keep"}  # of our forward too


class Case:
    """A random model twice; the batch of three rows (a picture, two, none), and three texts."""

    def __init__(self, family: str):
        self.family, self.made = family, MADE[family]
        self.hf, self.model = self.made.make_pair(seed=6)
        self.pictures = self.made.mixed_batch(self.model).to_hf()
        self.texts = self.model.prepare(None, list(random_llava.QUESTIONS)).to_hf()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        yield from (self.pictures, self.texts)

    def theirs(self, mapping: dict[str, Any]) -> Any:
        self.hf.model.rope_deltas = None  # the Qwen keeps those of its last call
        return self.hf(**mapping)

    def said(self, mapping: dict[str, Any], n: int = 6) -> Tensor:
        self.hf.model.rope_deltas = None
        tokens = self.hf.generate(**mapping, max_new_tokens=n, do_sample=False)
        return tokens[:, mapping["input_ids"].shape[1] :]

    def assert_logits_are_theirs(self, mapping: dict[str, Any]) -> None:
        expected, found = self.theirs(mapping).logits, self.model(mapping)
        tokens = mapping["attention_mask"].bool()
        difference = (found - expected)[tokens].abs().max()
        assert difference <= 5e-5 * max(1.0, float(expected[tokens].abs().max()))


@pytest.fixture(scope="module", params=MADE)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- positions --------------------------------------------------------------------------------------


def positions_of(case: Case, kind: str, mapping: dict[str, Tensor]) -> Tensor:
    """Positions that no model would count: gaps, other gaps on each axis, a restart."""
    rows, n = mapping["input_ids"].shape
    step = torch.arange(n)
    by_row = {
        "a row for all": (3 * step)[None],
        "gaps": step[None] * torch.arange(1, rows + 1)[:, None],
        "restart": (step % 7)[None].repeat(rows, 1),
        "by axis": torch.stack([step * a for a in (1, 2, 3)])[:, None] + torch.arange(rows)[None, :, None],
    }
    return by_row[kind]


KINDS = [("llava", k) for k in ("a row for all", "gaps", "restart")]
KINDS += [("qwen", k) for k in ("a row for all", "gaps", "restart", "by axis")]


@pytest.mark.parametrize("kind", ["a row for all", "gaps", "restart", "by axis"])
def test_position_ids_are_honoured(case: Case, kind: str) -> None:
    if (case.family, kind) not in KINDS:
        given = {**case.texts, "position_ids": positions_of(case, kind, case.texts)}
        with pytest.raises(ValueError, match=r"position_ids are \[3, 3, .*; this model reads \[batch, pos\]"):
            case.model(given)
        return
    for mapping in case.batches():
        given = {**mapping, "position_ids": positions_of(case, kind, mapping)}
        case.assert_logits_are_theirs(given)
        tokens = mapping["attention_mask"].bool()
        assert (case.model(given) - case.model(mapping))[tokens].abs().max() > 1e-2
        inputs = case.model.as_inputs(given)
        assert torch.equal(case.model(inputs), case.model(given))
        assert torch.equal(case.theirs(inputs.to_hf()).logits, case.theirs(given).logits)
        torch.testing.assert_close(
            case.model(inputs[[2, 0]]), case.model(given)[[2, 0]], atol=5e-5, rtol=5e-5
        )
        replaced = replace(case.model.as_inputs(mapping), position_ids=given["position_ids"])
        assert torch.equal(case.model(replaced), case.model(given))
        assert torch.equal(case.theirs(replaced.to_hf()).logits, case.theirs(given).logits)


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_generation_goes_on_behind_given_positions(case: Case, use_kv_cache: bool) -> None:
    for mapping in case.batches():
        given = {**mapping, "position_ids": positions_of(case, "gaps", mapping)}
        found = case.model.generate(given, 6, "tokens", use_kv_cache=use_kv_cache)
        assert torch.equal(found, case.said(given))


def test_counted_positions_are_left_to_hugging_face(case: Case) -> None:
    """Otherwise every comparison with its model would be one of our positions with themselves."""
    inputs = case.model.as_inputs(case.pictures)
    for seen in (inputs, inputs[1:], inputs.extended(torch.ones(3, 2, dtype=torch.long)), inputs.to("cpu")):
        assert "position_ids" not in seen.to_hf()
        assert "position_ids" not in case.model.as_inputs(seen).to_hf()


@pytest.mark.parametrize("lead", [(), (2,), (4, 3), (3, 2), (1, 1, 3)])
def test_positions_that_do_not_fit(case: Case, lead: tuple[int, ...]) -> None:
    shape = (*lead, case.pictures["input_ids"].shape[1])
    with pytest.raises(ValueError, match=r"position_ids are \["):
        case.model({**case.pictures, "position_ids": torch.zeros(shape, dtype=torch.long)})


# -- masks ------------------------------------------------------------------------------------------


def with_holes(mapping: dict[str, Tensor], image_token: int) -> dict[str, Tensor]:
    """Text tokens hidden in every row: one by itself, and two that follow each other."""
    mask = mapping["attention_mask"].clone()
    for row, ids in enumerate(mapping["input_ids"]):
        text = (mask[row].bool() & (ids != image_token)).nonzero()[:, 0].tolist()
        mask[row, [text[2], text[-4], text[-3]]] = 0
    return {**mapping, "attention_mask": mask}


def test_masks_with_holes(case: Case) -> None:
    for mapping in case.batches():
        holed = with_holes(mapping, case.model.cfg.image_token_id)
        case.assert_logits_are_theirs(holed)
        assert (case.model(holed) - case.model(mapping))[:, -1].abs().max() > 1e-2
        seen = replace(case.model.as_inputs(mapping), attention_mask=holed["attention_mask"])
        assert torch.equal(case.model(seen), case.model(holed)), "positions of another mask"


@pytest.mark.parametrize("use_kv_cache", [True, False])
def test_generation_under_masks_with_holes(case: Case, use_kv_cache: bool) -> None:
    for mapping in case.batches():
        holed = with_holes(mapping, case.model.cfg.image_token_id)
        for given in (holed, case.model.as_inputs(holed)):
            found = case.model.generate(given, 6, "tokens", use_kv_cache=use_kv_cache)
            assert torch.equal(found, case.said(holed))


def test_image_tokens_hidden_by_the_mask(case: Case) -> None:
    hidden = case.pictures["attention_mask"].clone()
    hidden[0, (case.pictures["input_ids"][0] == case.model.cfg.image_token_id).nonzero()[1:4, 0]] = 0
    holed = {**case.pictures, "attention_mask": hidden}
    if case.family == "llava":
        case.assert_logits_are_theirs(holed)
    else:
        with pytest.raises(ValueError, match="row 0: attention_mask hides 3 image tokens"):
            case.model(holed)


def test_masks_of_other_shapes_and_values(case: Case) -> None:
    ids = case.texts["input_ids"]
    n = ids.shape[1]
    for mask in (torch.ones(3, 1, n, n), torch.ones(3, n + 1), torch.ones(n)):
        with pytest.raises(ValueError, match=r"attention_mask \[.*\] does not fit input_ids \[3, "):
            case.model({"input_ids": ids, "attention_mask": mask})
    for value in (2, -1, 0.5):
        with pytest.raises(ValueError, match="attention_mask has values other than 0"):
            case.model({"input_ids": ids, "attention_mask": torch.full(ids.shape, value)})
    as_bool = {"input_ids": ids, "attention_mask": case.texts["attention_mask"].bool()}
    assert torch.equal(case.model(as_bool), case.model(case.texts))


# -- labels -----------------------------------------------------------------------------------------


def some_labels(mapping: dict[str, Tensor]) -> Tensor:
    """Other tokens than those that follow, at two of three positions behind each row's first token."""
    labels = (mapping["input_ids"] * 7 + 3) % 100
    labels[:, ::3] = -100
    return labels.masked_fill(mapping["attention_mask"].cumsum(-1) < 2, -100)


def test_labels_give_hugging_faces_loss(case: Case) -> None:
    for mapping in case.batches():
        given = {**mapping, "labels": some_labels(mapping)}
        expected = case.theirs(given)
        loss = case.model(given, return_type="loss")
        torch.testing.assert_close(loss, expected.loss)
        assert (loss - case.model(mapping, return_type="loss")).abs() > 1e-3
        both = case.model(given, return_type="both")
        torch.testing.assert_close(both.loss, expected.loss)
        assert torch.equal(both.logits, case.model(mapping))
        rows = case.model.as_inputs(given)[[2, 1]]
        expected = case.theirs({**rows.to_hf(), "labels": given["labels"][[2, 1]]}).loss
        torch.testing.assert_close(case.model(rows, return_type="loss"), expected)


def test_labels_come_before_the_answer(case: Case) -> None:
    answered = case.made.mixed_batch(case.model, ["red", "two large circles", "no"])
    labels = some_labels(answered.to_hf())
    expected = case.theirs({**answered.to_hf(), "labels": labels}).loss
    torch.testing.assert_close(case.model(replace(answered, labels=labels), return_type="loss"), expected)


def test_labels_that_leave_nothing_to_predict(case: Case) -> None:
    nothing = {**case.texts, "labels": torch.full_like(case.texts["input_ids"], -100)}
    with pytest.raises(ValueError, match="no token to predict, so there is no loss"):
        case.model(nothing, return_type="loss")


def test_labels_that_can_not_be_honoured(case: Case) -> None:
    with pytest.raises(ValueError, match=r"labels \[3, 2\] do not fit input_ids"):
        case.model({**case.texts, "labels": torch.zeros(3, 2, dtype=torch.long)}, return_type="loss")
    labels = case.texts["input_ids"].masked_fill(case.texts["attention_mask"] == 0, -100)
    first = int(case.texts["attention_mask"][0].argmax())
    assert first > 0
    with pytest.raises(ValueError, match=f"row 0: the label at position {first} would be predicted from pad"):
        case.model({**case.texts, "labels": labels}, return_type="loss")


def test_labels_of_rows_padded_on_the_right(case: Case) -> None:
    """As for training: padding is no target, and what is predicted is what it is without padding."""
    rolled = {name: value.clone() for name, value in case.texts.items()}
    for row, mask in enumerate(case.texts["attention_mask"]):
        for value in rolled.values():
            value[row] = value[row].roll(int(mask.sum()))
    labels = rolled["input_ids"].masked_fill(rolled["attention_mask"] == 0, -100)
    given = {**rolled, "labels": labels}
    torch.testing.assert_close(case.model(given, return_type="loss"), case.theirs(given).loss)


# -- all the rest -----------------------------------------------------------------------------------


def test_every_key_is_honoured_or_refused_by_name(case: Case) -> None:
    keys = set(inspect.signature(type(case.hf).forward).parameters) - {"self", "kwargs"}
    assert HONOURED[case.family] < keys
    more = {"cache_position", "rope_deltas", "output_attentions", "image_sizes", "vision_feature_layer"}
    more |= {
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "image_grid_thw",
        "num_items_in_batch",
    }
    for key in sorted((keys | more) - HONOURED[case.family]):
        with pytest.raises(ValueError, match=f"inputs key '{key}'"):
            case.model({**case.texts, key: torch.ones(1, 3, dtype=torch.long)})
        assert torch.equal(case.model({**case.texts, key: None}), case.model(case.texts))
    assert set(inspect.signature(HookedVLM.forward).parameters) >= OPTIONS


def test_token_type_ids_are_read_by_neither(case: Case) -> None:
    given = {**case.texts, "token_type_ids": torch.ones_like(case.texts["input_ids"])}
    case.assert_logits_are_theirs(given)


def test_token_types_that_mark_other_tokens(case: Case) -> None:
    image = case.pictures["input_ids"] == case.model.cfg.image_token_id
    types = image.long()
    assert torch.equal(case.model({**case.pictures, "mm_token_type_ids": types}), case.model(case.pictures))
    types[1, -1] = 1
    with pytest.raises(ValueError, match=r"row 1: mm_token_type_ids mark .* image tokens, input_ids have"):
        case.model({**case.pictures, "mm_token_type_ids": types})


def test_ids_of_another_shape(case: Case) -> None:
    for ids in (torch.tensor([1, 5, 6]), torch.ones(1, 2, 3, dtype=torch.long), torch.ones(1, 3)):
        with pytest.raises(ValueError, match=r"input_ids are torch\.\w+ \[.*\]; give ids \[batch, pos\]"):
            VLMInputs.from_hf({"input_ids": ids})


def test_grids_without_pictures(case: Case) -> None:
    with pytest.raises(ValueError, match="image_grid_thw"):
        case.model({**case.texts, "image_grid_thw": torch.tensor([[1, 4, 4]])})
