"""Masks of parts of a sequence are the rows of the mask of the whole, in layers that slide, too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hones_lens.model.nn.context import AttentionContext, attention_mask

N, WINDOW = 9, 4


def sees(query: int, key: int, window: int | None) -> bool:
    return key <= query and (window is None or query - key < window)


def by_hand(queries: list[int], n_keys: int, window: int | None) -> Tensor:
    return torch.tensor([[sees(q, k, window) for k in range(n_keys)] for q in queries])


@pytest.fixture
def whole() -> AttentionContext:
    angles = torch.arange(2.0 * N * 4).view(2, N, 4)
    sliding = AttentionContext(angles, angles, causal=True, window=WINDOW)
    return AttentionContext(angles, angles, causal=True, sliding=sliding)


@pytest.mark.parametrize("window", [None, 1, WINDOW, N - 1, N])
def test_the_mask_is_that_of_the_rule(window: int | None) -> None:
    seen = torch.ones(1, N, dtype=torch.bool)
    for n_queries in (1, 3, N):
        mask = attention_mask(seen, n_queries, window)
        expected = by_hand(list(range(N - n_queries, N)), N, window)
        if mask is None:
            assert n_queries == N and bool((expected == torch.ones(N, N).tril().bool()).all())
        else:
            assert torch.equal(mask[0, 0].expand_as(expected), expected)


def test_the_last_queries_and_single_ones_see_what_they_see_in_the_whole(whole: AttentionContext) -> None:
    masked = whole.masked(torch.ones(2, N, dtype=torch.bool), N)
    late = masked.last(3, N)
    single = whole[:, :1].seeing(torch.tensor([5, 8]), N)
    for part, window in ((late, None), (late.sliding, WINDOW)):
        assert torch.equal(part.mask[0, 0], by_hand([6, 7, 8], N, window))
        assert torch.equal(part.cos, whole.cos[:, 6:])
    for part, window in ((single, None), (single.sliding, WINDOW)):
        assert torch.equal(part.mask[:, 0, 0], by_hand([5, 8], N, window))


def test_tokens_of_several_rows_keep_their_angles(whole: AttentionContext) -> None:
    tokens = AttentionContext.of_text([(whole, 1, 3), (whole, 0, 7)])
    for part, of in ((tokens, whole), (tokens.sliding, whole.sliding)):
        assert torch.equal(part.cos[:, 0], torch.stack([of.cos[1, 3], of.cos[0, 7]]))
    assert tokens.sliding.window == WINDOW


def test_tensors_and_back(whole: AttentionContext) -> None:
    masked = whole.masked(torch.ones(2, N, dtype=torch.bool), N)
    again = AttentionContext.of_tensors(masked.tensors())
    assert again.mask is None and torch.equal(again.sliding.mask, masked.sliding.mask)
    assert torch.equal(again.cos, masked.cos) and again.causal and again.sliding.causal


GROUPS = [-1, 0, 0, 0, -1, -1, 1, 1, -1]


def sees_in_groups(query: int, key: int, window: int | None) -> bool:
    one = GROUPS[query] == GROUPS[key] >= 0
    return (key <= query or one) and (window is None or query - key < window)


@pytest.mark.parametrize("window", [None, 1, 2, WINDOW, N])
def test_tokens_of_a_group_see_each_other(window: int | None) -> None:
    """Queries see what is behind them in their group; the window bounds what is before them there, too."""
    groups, seen = torch.tensor([GROUPS, [-1] * N]), torch.ones(2, N, dtype=torch.bool)
    seen[1, :2] = False
    rule = torch.tensor([[sees_in_groups(q, k, window) for k in range(N)] for q in range(N)])
    plain = by_hand(list(range(N)), N, window) & seen[1] | torch.eye(N, dtype=torch.bool)
    for n_queries in (1, 3, N):
        mask = attention_mask(seen, n_queries, window, groups)
        assert mask is not None
        assert torch.equal(mask[0, 0], rule[N - n_queries :])
        assert torch.equal(mask[1, 0], plain[N - n_queries :])


def test_groups_of_parts_of_a_context(whole: AttentionContext) -> None:
    groups = torch.tensor([GROUPS, GROUPS])
    grouped = replace(whole, groups=groups, sliding=replace(whole.sliding, groups=groups))
    seen = torch.ones(2, N, dtype=torch.bool)
    masked = grouped.masked(seen, N)
    for part, window in ((masked, None), (masked.sliding, WINDOW)):
        rule = torch.tensor([[sees_in_groups(q, k, window) for k in range(N)] for q in range(N)])
        for some in (part.last(4, N), grouped.masked(seen, 4).behind(4)):
            of = some if window is None or some.window else some.sliding
            assert torch.equal(of.mask[1, 0], rule[5:]) and torch.equal(of.cos, whole.cos[:, 5:])
            assert torch.equal(of.groups, groups[:, 5:])
    behind = grouped[:, 4:].masked(seen, 5)  # the last tokens alone, behind keys that they do not know
    assert torch.equal(
        behind.mask[0, 0], torch.tensor([[sees_in_groups(q, k, None) for k in range(N)] for q in range(4, N)])
    )
    assert torch.equal(masked.repeated(2).groups, torch.cat((groups, groups)))
    again = AttentionContext.of_tensors(masked.tensors())
    assert again.groups is None and torch.equal(again.mask, masked.mask)
    assert torch.equal(again.sliding.mask, masked.sliding.mask)
    assert AttentionContext.of_text([(grouped, 0, 2)]).groups is None
