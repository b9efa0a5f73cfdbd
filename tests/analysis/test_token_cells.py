"""Images folded into one cell, against sums and means over Hugging Face's attentions."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava
from helpers.attention_cases import FAMILIES, HEADS, ROW, patches, twin

from hones_lens.analysis.token_cells import fold_tokens, folded_attention


@FAMILIES
def test_cells_are_the_tokens_in_order_with_each_image_as_one(made) -> None:
    both, inputs, _ = twin(made)
    for row in range(3):
        cells = fold_tokens(both.model, inputs, row=row)
        there = inputs.attention_mask[row].nonzero()[:, 0].tolist()
        assert [p for span in cells.spans for p in span] == there
        tokens = both.model.to_str_tokens(inputs.input_ids[row])
        images = [patches(both, inputs, row, i).flatten().tolist() for i in range(len(inputs.grids[row]))]
        expected, position = [], there[0]
        while position < len(tokens):
            image = next((i for i, mine in enumerate(images) if position in mine), None)
            if image is None:
                expected.append((tokens[position], (position,), None))
                position += 1
            else:
                rows, columns = inputs.grids[row][image]
                expected.append((f"[image {image}: {rows} × {columns}]", tuple(images[image]), image))
                position = images[image][-1] + 1
        assert list(zip(cells.names, cells.spans, cells.images, strict=True)) == expected
        assert len(cells) == len(expected)


@FAMILIES
def test_attention_to_an_image_is_summed_and_from_it_averaged(made) -> None:
    both, inputs, theirs = twin(made)
    found = folded_attention(both.model, inputs, HEADS, row=ROW)
    cells = found.cells
    for h, (layer, head) in enumerate(HEADS):
        whole = theirs[layer, ROW, head]
        for a, queries in enumerate(cells.spans):
            for b, keys in enumerate(cells.spans):
                expected = sum(float(whole[q, k]) for q in queries for k in keys) / len(queries)
                assert float(found.pattern[h, a, b]) == pytest.approx(expected, abs=1e-5)
            for image in (0, 1):
                grid = patches(both, inputs, ROW, image)
                expected_patches = whole[list(queries)].mean(0)[grid]
                assert torch.allclose(found.patches[image][h, a], expected_patches, atol=1e-5)
    assert found.pattern.sum(-1).allclose(torch.ones(3, len(cells)), atol=1e-5)
    assert found.names == ("L0H3", "L2H1", "L1H0")
    assert str(found).endswith(f"attention of L0H3, L2H1, L1H0 between {len(cells)} cells")


def test_text_that_is_not_kept_becomes_stretches() -> None:
    both, inputs, theirs = twin(random_llava)
    cells = fold_tokens(both.model, inputs, "question", row=ROW)
    question = inputs.question_mask[ROW].nonzero()[:, 0].tolist()
    kept = [span for span, image in zip(cells.spans, cells.images, strict=True) if image is None]
    assert [span for span in kept if span[0] in question] == [(p,) for p in question]
    others = [span for span in kept if span[0] not in question]
    named = [name for name in cells.names if name.endswith("tokens]") or name.endswith("token]")]
    assert named == [f"[{len(span)} token{'s' if len(span) > 1 else ''}]" for span in others]
    assert any(len(span) > 1 for span in others)
    there = inputs.attention_mask[ROW].nonzero()[:, 0].tolist()
    assert [p for span in cells.spans for p in span] == there
    pattern = cells.pattern(theirs[0, ROW])
    assert pattern.sum(-1).allclose(torch.ones(4, len(cells)), atol=1e-5)


def test_values_of_cells() -> None:
    both, inputs, _ = twin(random_llava)
    cells = fold_tokens(both.model, inputs, row=ROW)
    values = torch.randn(2, inputs.input_ids.shape[1])
    image = patches(both, inputs, ROW, 1).flatten()
    at = cells.images.index(1)
    for how, expected in {
        "sum": values[:, image].sum(1),
        "mean": values[:, image].mean(1),
        "max": values[:, image].amax(1),
    }.items():
        folded = cells.fold(values, how)
        assert torch.allclose(folded[:, at], expected, atol=1e-5)
        assert torch.equal(folded[:, -1], values[:, -1])
    with pytest.raises(ValueError, match="'median'; valid: sum, mean, max"):
        cells.fold(values, "median")
    with pytest.raises(ValueError, match="5 values for"):
        cells.fold(torch.zeros(5))


def test_what_is_refused() -> None:
    both, inputs, _ = twin(random_llava)
    n = len(fold_tokens(both.model, inputs))
    assert len(fold_tokens(both.model, inputs, most=n)) == n
    with pytest.raises(ValueError, match=f"{n} cells, more than {n - 1}.*keep='question'"):
        fold_tokens(both.model, inputs, most=n - 1)
    with pytest.raises(IndexError, match="no row 3"):
        fold_tokens(both.model, inputs, row=3)
    with pytest.raises(ValueError, match="no heads"):
        folded_attention(both.model, inputs, [])
