"""Where heads look, against Hugging Face's attentions."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava
from helpers.attention_cases import FAMILIES, HEADS, ROW, patches, twin

from hones_lens.analysis.attention import head_attention
from hones_lens.interventions.hooks import block_attention
from hones_lens.interventions.token_groups import Box


@FAMILIES
@pytest.mark.parametrize("image", [0, 1])
def test_attention_of_any_head_on_any_image(made, image: int) -> None:
    both, inputs, theirs = twin(made)
    found = head_attention(both.model, inputs, HEADS, row=ROW)
    grid = patches(both, inputs, ROW, image)
    expected = torch.stack([theirs[layer, ROW, head, -1][grid] for layer, head in HEADS])
    assert torch.allclose(found.on_image(image), expected, atol=1e-5)
    assert found.on_image(image).shape == (3, *inputs.grids[ROW][image])
    assert found.names == ("L0H3", "L2H1", "L1H0")
    assert found.weights.sum(-1).allclose(torch.ones(3), atol=1e-5)
    shares = [f"{name} {float(e.sum()):.3f}" for name, e in zip(found.names, expected, strict=True)]
    assert f"on image {image}: {', '.join(shares)}" in str(found)


@FAMILIES
def test_from_positions_tokens_and_groups(made) -> None:
    both, inputs, theirs = twin(made)
    model, row = both.model, theirs[:, ROW]
    tokens = model.to_str_tokens(inputs.input_ids[ROW])
    length = len(tokens)
    many = next(i for i, token in enumerate(tokens) if token.lstrip("▁") == "many")
    left, top = inputs.regions[ROW][1][:2]
    first = patches(both, inputs, ROW, 1)[0, 0].view(1)
    box = Box(left, top, left + 0.1, top + 0.1, image=1)
    mask = torch.zeros_like(inputs.image_mask)
    mask[:, -3:-1] = True
    cases = {
        -2: ([length - 2], f"position {length - 2}, {tokens[-2]}"),
        many: ([many], f"position {many}, {tokens[many]}"),
        "many": ([many], f"position {many}, {tokens[many]}"),
        tokens[many]: ([many], f"position {many}, {tokens[many]}"),
        "last": ([length - 1], f"the last token, {tokens[-1]}"),
        "question": (
            inputs.question_mask[ROW].nonzero()[:, 0].tolist(),
            f"question, mean over {int(inputs.question_mask[ROW].sum())} tokens",
        ),
        box: (first.tolist(), str(box)),
    }
    for source, (positions, name) in cases.items():
        found = head_attention(model, inputs, HEADS, source, row=ROW)
        expected = torch.stack([row[layer, head, positions].mean(0) for layer, head in HEADS])
        assert torch.allclose(found.weights, expected, atol=1e-5), source
        assert (found.positions, found.source) == (tuple(positions), name)
    found = head_attention(model, inputs, HEADS, mask, row=ROW)
    assert found.positions == (length - 3, length - 2)
    assert found.source == "mask, mean over 2 tokens"


@FAMILIES
def test_sinks_are_what_all_heads_look_at_from_behind_the_picture(made) -> None:
    both, inputs, theirs = twin(made)
    found = head_attention(both.model, inputs, HEADS, row=ROW)
    behind = int(patches(both, inputs, ROW, 1).max()) + 1
    mean = theirs[:, ROW, :, behind:].mean((0, 1, 2))
    assert found.received is not None
    assert torch.allclose(found.received, mean, atol=1e-5)
    for image in (0, 1):
        here = mean[patches(both, inputs, ROW, image)]
        for times in (1.0, 1.3, float(here.max() / here.median()) * 1.01):
            assert torch.equal(found.sinks(image, times), here > times * here.median())
        assert found.sinks(image, 1.0).any() and not found.sinks(image, times).any()
    planted = found.received.clone()
    grid = patches(both, inputs, ROW, 1)
    planted[grid[0, 1]] = 6 * planted[grid].median()
    object.__setattr__(found, "received", planted)
    assert found.sinks(1).nonzero().tolist() == [[0, 1]]


def test_a_row_is_alone_what_it_is_in_the_batch_and_hooks_count() -> None:
    both, inputs, _ = twin(random_llava)
    alone = head_attention(both.model, inputs[0].without_padding(), HEADS)
    among = head_attention(both.model, inputs, HEADS)
    assert torch.allclose(alone.on_image(), among.on_image(), atol=1e-5)
    groups = inputs[:1].token_groups
    blocked = head_attention(
        both.model, inputs, HEADS, hooks=[block_attention(0, groups["last"], groups["image"])]
    )
    assert float(blocked.on_image()[0].max()) == 0 < float(blocked.on_image()[1].max())


def test_what_is_refused() -> None:
    both, inputs, _ = twin(random_llava)
    model = both.model
    length, padding = inputs.input_ids.shape[1], int((inputs.attention_mask[0] == 0).sum())
    refused = {
        "no heads": {"heads": []},
        "head L3H0 does not exist: 3 layers of 4 heads": {"heads": [(3, 0)]},
        f"position {length} is not among the row's {padding} … {length - 1}": {"source": length},
        "position 0 is not among": {"source": 0},
        "no token 'zebra', nor is that a group; groups: all, image": {"source": "zebra"},
        "the row has 32 tokens '<image>', at .*, …: give a position": {"source": "<image>", "row": ROW},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            head_attention(model, inputs, options.pop("heads", HEADS), **options)
    with pytest.raises(IndexError, match="no row 3"):
        head_attention(model, inputs, HEADS, row=3)
    before = head_attention(model, inputs, HEADS, padding)
    with pytest.raises(ValueError, match=f"position {padding}, .* comes before image 0"):
        before.on_image()
    with pytest.raises(IndexError, match="there is no image 1"):
        before.on_image(1)
    with pytest.raises(ValueError, match="at least 1"):
        before.sinks(times=0.5)
    text = head_attention(model, inputs, HEADS, row=2)
    assert text.received is None
    with pytest.raises(ValueError, match="no text follows"):
        text.sinks()
