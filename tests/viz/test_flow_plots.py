"""Links are as wide as the contributions."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from helpers.figures import check_drawing, groups
from matplotlib.colors import to_hex

from hones_lens.hones.attribution.flow import HeadNeuronFlow, PromotedToken
from hones_lens.results.files import Component
from hones_lens.viz import theme
from hones_lens.viz.flow_plots import COLUMNS, LINKS, flow_tooltips, head_neuron_token_flow

TOKENS = ("red", "<s>", "▁blue", "<image>", "circle", "left")


def flow(n_heads: int = 10, n_neurons: int = 15, seed: int = 0) -> HeadNeuronFlow:
    """Contributions of which a third are 0, but of the first head; every neuron promotes three tokens."""
    rng = np.random.default_rng(seed)
    feeds = rng.exponential(size=(n_heads, n_neurons)) * (rng.random((n_heads, n_neurons)) > 1 / 3)
    feeds[0] += 0.1
    feeds = feeds[:, np.argsort(-feeds.sum(0))]
    promoted = []
    for _ in range(n_neurons):
        chosen = rng.choice(TOKENS, 3, replace=False)
        logits = np.sort(rng.uniform(0.5, 2, 3))[::-1]
        promoted.append(tuple(PromotedToken(str(t), float(v)) for t, v in zip(chosen, logits, strict=True)))
    return HeadNeuronFlow(
        task="vqa",
        model_name="tiny-llava",
        heads=tuple(Component(i // 4, i % 4, 0.1) for i in range(n_heads)),
        neurons=tuple(Component(i % 3, 100 + i, float(feeds[:, i].sum())) for i in range(n_neurons)),
        contributions=torch.tensor(feeds),
        total=4 * float(feeds.sum()),
        activations=torch.tensor(rng.normal(size=n_neurons)),
        promoted=tuple(promoted),
        n_examples=60,
    )


def names(axes, column: str) -> list[str]:
    return [text.get_text() for text in groups(axes, f"{column}-name")]


def spans(axes, column: str) -> list[tuple[float, float]]:
    """From where to where the bars of a column reach."""
    (bars,) = groups(axes, column)
    return [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for path in bars.get_paths()]


def links(axes, stage: int) -> dict[tuple[str, str], float]:
    """Width of every link by the names of its ends, read from where its corners lie."""
    left, right = COLUMNS[stage : stage + 2]
    (bands,) = groups(axes, LINKS[stage])
    found = {}
    for path in bands.get_paths():
        corners = path.vertices
        (y0, y1), (y2, y3) = sorted(corners[[0, 7], 1]), sorted(corners[[3, 4], 1])
        assert y1 - y0 == pytest.approx(y3 - y2)
        ends = []
        for column, low, high in ((left, y0, y1), (right, y2, y3)):
            inside = [
                name
                for name, (top, bottom) in zip(names(axes, column), spans(axes, column), strict=True)
                if top - 1e-9 <= low and high <= bottom + 1e-9
            ]
            assert len(inside) == 1
            ends += inside
        found[ends[0], ends[1]] = y1 - y0
    return found


def test_links_from_heads_are_the_contributions() -> None:
    made = flow()
    axes = head_neuron_token_flow(made, heads=10).axes[0]
    expected = {}
    for h, n in torch.nonzero(made.contributions[:, :12]).tolist():
        sign = " (−)" if made.activations[n] < 0 else ""
        neuron = f"L{made.neurons[n].layer}N{made.neurons[n].index}{sign}"
        expected[f"L{made.heads[h].layer}H{made.heads[h].index}", neuron] = float(made.contributions[h, n])
    found = links(axes, 0)
    assert found.keys() == expected.keys()
    for ends, width in found.items():
        assert width == pytest.approx(expected[ends])
    heights = {
        name: bottom - top
        for name, (top, bottom) in zip(names(axes, "neurons"), spans(axes, "neurons"), strict=True)
    }
    for n in range(12):
        (height,) = [h for name, h in heights.items() if name.split()[0] == f"L{n % 3}N{100 + n}"]
        assert height == pytest.approx(made.neurons[n].score)


def test_links_have_the_colour_of_their_head() -> None:
    axes = head_neuron_token_flow(flow(), heads=5).axes[0]
    (bars,), (bands,) = groups(axes, "heads"), groups(axes, LINKS[0])
    of_head = dict(zip(names(axes, "heads"), bars.get_facecolor()[:, :3].tolist(), strict=True))
    shown = bands.get_facecolor()[:, :3].tolist()
    assert [of_head[head] for head, _ in links(axes, 0)] == shown
    given = flow().contributions[:, :12].sum(1).argsort(descending=True)[:4].tolist()
    assert [to_hex(of_head[f"L{h // 4}H{h % 4}"]) for h in given] == list(theme.SERIES)


def test_heads_that_contribute_least_become_one() -> None:
    made = flow()
    axes = head_neuron_token_flow(made, heads=3).axes[0]
    given = made.contributions[:, :12].sum(1)
    best = sorted(given.argsort(descending=True)[:3].tolist())
    assert names(axes, "heads") == [f"L{h // 4}H{h % 4}" for h in best] + ["7 others"]
    heights = [bottom - top for top, bottom in spans(axes, "heads")]
    assert heights == pytest.approx([*given[best].tolist(), float(given.sum() - given[best].sum())])
    assert sum(heights) == pytest.approx(float(made.contributions[:, :12].sum()))


def test_tokens_share_a_neuron_s_importance_by_how_much_it_promotes_them() -> None:
    made = flow()
    axes = head_neuron_token_flow(made).axes[0]
    expected = {}
    for n in range(12):
        sign = " (−)" if made.activations[n] < 0 else ""
        first, second = made.promoted[n][:2]
        for one in (first, second):
            share = one.logit / (first.logit + second.logit)
            expected[f"L{n % 3}N{100 + n}{sign}", one.token] = made.neurons[n].score * share
    found = links(axes, 1)
    assert found.keys() == expected.keys()
    for ends, width in found.items():
        assert width == pytest.approx(expected[ends])
    assert set(names(axes, "tokens")) == {token for _, token in expected}
    assert {"<s>", "<image>"} <= set(names(axes, "tokens"))


def test_neurons_stand_by_layer_and_no_bars_overlap() -> None:
    axes = head_neuron_token_flow(flow()).axes[0]
    layers = [int(name[1]) for name in names(axes, "neurons")]
    assert layers == sorted(layers)
    assert names(axes, "heads")[:-1] == sorted(names(axes, "heads")[:-1])
    for column in COLUMNS:
        reached = spans(axes, column)
        assert all(below[0] > above[1] for above, below in pairwise(reached))
        assert reached[0][0] == 0


def test_the_note_says_n_and_what_is_left_out() -> None:
    made = flow()
    figure = head_neuron_token_flow(made)
    note = figure.heading.note.replace("\u00a0", " ")
    share = float(made.contributions[:, :12].sum()) / made.total
    assert f"12 of 15 task neurons, {100 * share:.0f} % of the importance" in note
    assert "(−): active below 0" in note and "n = 60 examples" in note
    positive = head_neuron_token_flow(flow(2, 1)).heading.note
    assert ("(−)" in positive) == bool(flow(2, 1).activations[0] < 0)


@pytest.mark.parametrize("n_heads, n_neurons", [(10, 15), (1, 1), (2, 3)])
def test_it_is_drawn_whole_and_its_parts_speak_when_pointed_at(n_heads: int, n_neurons: int) -> None:
    made = flow(n_heads, n_neurons, seed=2)
    figure = head_neuron_token_flow(made)
    check_drawing(figure)
    tips = flow_tooltips(made)
    root = ElementTree.fromstring(theme.themed_svg(figure, "a", "b", tips))
    said = [title.text for title in root.iter("title")]
    assert sorted(said) == sorted(text for texts in tips.values() for text in texts)
    widths = links(figure.axes[0], 0)
    for (head, neuron), width in widths.items():
        share = 100 * width / sum(widths.values())
        (text,) = [t for t in tips["head-neuron"] if t.startswith(f"{head} → {neuron}: ")]
        assert text.split(": ")[1].startswith(f"{width:.3g} (")
        told = float(text.split("(")[-1].split(" %")[0])
        assert told == pytest.approx(share, rel=0.06, abs=0.51)


def test_what_does_not_flow_is_left_out_or_refused() -> None:
    made = flow(3, 4)
    made.contributions[:, 1] = 0.0
    made.contributions[2] = 0.0
    axes = head_neuron_token_flow(made).axes[0]
    assert [name for name in names(axes, "neurons") if "N101" in name] == []
    assert names(axes, "heads") == ["L0H0", "L0H1"]
    made.contributions[:] = 0.0
    with pytest.raises(ValueError, match="nothing flows"):
        head_neuron_token_flow(made)
    with pytest.raises(ValueError, match="4 tokens of each neuron asked for; the flow has 3"):
        head_neuron_token_flow(flow(), tokens=4)
    with pytest.raises(ValueError, match="not 0 heads"):
        head_neuron_token_flow(flow(), heads=0)
