"""Cards of a report: what is laid over a picture is a head's attention, where the model looked."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from helpers import example_results as made
from helpers.example_pairs import pair
from helpers.report_page import written
from PIL import Image

from hones_lens.app.report.cards import attention_uri, example_card, pair_card
from hones_lens.app.report.run_view import ExampleView


def pixels(uri: str) -> np.ndarray:
    """Grey and opacity of each pixel, [rows columns 2]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("LA"))


def with_heads(n_layers: int = 4, n_heads: int = 8, **changes: object) -> ExampleView:
    """An example whose heads all look elsewhere."""
    draw = torch.Generator().manual_seed(0)
    names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    looks = {name: torch.rand(8, 8, generator=draw) / 64 for name in names}
    return made.example(**{"looks": looks, "head": "L1H3", **changes})


def test_the_veil_over_a_patch_is_its_share_of_the_largest_attention() -> None:
    values = torch.tensor([[0.4, 0.1, 0.0], [0.2, 0.39, 0.04]])
    found = pixels(attention_uri(values))
    assert found.shape == (2, 3, 2)
    np.testing.assert_allclose(found[..., 1], 0.64 * 255 * (1 - values.numpy() / 0.4), atol=0.6)
    assert found[0, 0, 1] == 0 and found[0, 2, 1] == 163, "clear at the brightest, dark at 0"
    assert pixels(attention_uri(torch.zeros(2, 2)))[..., 1].min() == 163


def test_every_head_can_be_chosen_and_shows_its_own_attention(tmp_path) -> None:
    example = with_heads()
    source, page = written(tmp_path, made.run(examples=[example]))
    labels = re.findall(r"<label.*?</label>", source, re.DOTALL)
    assert len(labels) == len(example.looks) == 32
    assert [name for label in labels for name in re.findall(r"L\dH\d(?=</span>)", label)] == list(
        example.looks
    )
    assert [re.search(r"checked", label) is not None for label in labels].count(True) == 1
    for label, (name, values) in zip(labels, example.looks.items(), strict=True):
        assert ("checked" in label) == (name == "L1H3")
        maps = re.findall(r'src="([^"]+)"', label)
        assert len(maps) == 2 and maps[0] == maps[1], "by patch, and smoothed"
        expected = 163 * (1 - values.numpy() / float(values.max()))
        np.testing.assert_allclose(pixels(maps[0])[..., 1], expected, atol=0.6)
        said = f"{float(values.sum()):.3f} on the picture in all, {float(values.max()):.3f} on the brightest"
        assert f"Attention of {name} from the last prompt token to 8 × 8 patches: {said}" in label
        assert f"--share: {float(values.sum()):.3f}" in label
    assert "--columns: 8" in source, "a line for each layer"
    assert "Choose a head below the pictures" in page.text


def test_the_map_lies_where_the_patches_are() -> None:
    attention = torch.zeros(2, 4)
    attention[1, 2] = 0.5
    parts = {"region": (24.0, 0.0, 136.0, 112.0), "looks": {"L1H3": attention}}
    example = made.example(image=made.image((160, 112)), **parts)
    (look,) = example_card(example).looks
    assert look.place == "left: 15%; top: 0%; width: 70%; height: 100%"
    assert look.brightest == "left: 50%; top: 50%; width: 25%; height: 50%"
    assert "Veiled: cut off" in look.note and "Veiled" not in example_card(made.example()).looks[0].note
    assert example_card(example).aspect == "160 / 112"
    with pytest.raises(ValueError, match="does not lie in a picture"):
        example_card(made.example(region=(0.0, 0.0, 160.0, 112.0)))


@pytest.mark.parametrize(
    ("heads", "columns"),
    [
        (["L0H0", "L0H1", "L1H0", "L1H1"], 2),
        (["L0H5", "L1H2", "L1H7"], 0),
        ([f"L{layer}H{head}" for layer in range(2) for head in range(16)], 0),
        (["L0H1"], 0),
    ],
)
def test_lines_are_layers_where_all_heads_are_there(heads: list[str], columns: int) -> None:
    looks = {head: made.attention() for head in heads}
    card = example_card(made.example(head=heads[0], looks=looks))
    assert card.columns == columns and [look.head for look in card.looks] == heads


def test_one_head_is_no_choice_and_none_is_a_picture(tmp_path) -> None:
    source, page = written(tmp_path, made.run(examples=[made.example()]))
    assert 'class="heads only"' in source and "Choose a head" not in page.text
    card = example_card(made.example(looks={}, answer_masked=None))
    assert [label for label, _ in card.pictures] == ["picture"] and not card.looks
    assert [fact.name for fact in card.facts] == ["prompt", "right answer", "model"]


def test_a_pair_shows_both_pictures_where_there_are_two() -> None:
    card = pair_card(pair())
    assert [label for label, _ in card.pictures] == ["clean", "corrupted"]
    assert [(fact.name, fact.text) for fact in card.facts[2:]] == [
        ("clean answer", "red"),
        ("other answer", "<s>"),
    ]
    alone = pair_card(pair(corrupted=None, foil=None))
    assert [label for label, _ in alone.pictures] == ["clean"] and len(alone.facts) == 3
