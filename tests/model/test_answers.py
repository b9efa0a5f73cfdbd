"""Log-probabilities of answers, against sums token by token."""

from __future__ import annotations

import math

import pytest
import torch

from hones_lens.model.answers import Answer, summed_log_probs


def by_hand(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Of one row, [kept d_vocab], in plain Python."""
    total = 0.0
    for row, token, counts in zip(logits.tolist(), ids.tolist(), mask.tolist(), strict=True):
        total += counts * (row[token] - math.log(sum(math.exp(x) for x in row)))
    return total


def test_log_probs_of_an_answer_are_summed_over_its_own_tokens() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 4, 7), torch.randint(7, (2, 3, 4))
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool().expand(2, 3, 4)
    actual = summed_log_probs(logits.log_softmax(-1), ids, mask)
    for arm in range(2):
        for row in range(3):
            expected = by_hand(logits[arm, row], ids[arm, row], mask[arm, row])
            assert actual[arm, row].item() == pytest.approx(expected, abs=1e-5)


def test_rows_that_repeat_a_batch_are_scored_by_its_answers() -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(7, (2, 3)), torch.tensor([[True, True, False], [True, True, True]])
    logits = torch.randn(6, 3, 7)
    actual = Answer(torch.arange(3), ids, mask).log_probs(logits)
    expected = [by_hand(logits[i], ids[i % 2], mask[i % 2]) for i in range(6)]
    assert actual.tolist() == pytest.approx(expected, abs=1e-5)
