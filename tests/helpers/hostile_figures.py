"""Every view once, of results whose tokens and names would be markup, formulas or missing glyphs if let."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from PIL import Image

from helpers import example_comparisons as shared, example_results as made, random_llava
from helpers.attention_cases import HEADS, ROW, twin
from hones_lens import viz
from hones_lens.analysis.attention import HeadAttention, head_attention
from hones_lens.analysis.lens.table import LensPosition, LogitLens
from hones_lens.analysis.token_cells import FoldedAttention, folded_attention
from hones_lens.hones.attribution.flow import HeadNeuronFlow, PromotedToken
from hones_lens.results.files import Component
from hones_lens.results.labelled import Labelled
from hones_lens.viz.theme import Plot

HOSTILE = ("<s>", "</script>", "<image>", "&lt;", "$x^2$", "<!--", "猫")
TASK = "<b>&task"


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures() -> list[Image.Image]:
    """Those of row 1 of the tiny LLaVA's batch."""
    return random_llava.make_images(3)[1:]


def with_ends(what: str, axes: tuple[str, ...], shape: tuple[int, ...], **labels: tuple) -> Labelled:
    values = random(0, *shape)
    width = random(1, *shape).abs()
    ends = {"low": values - width, "high": values + width}
    return Labelled(what, values, axes, labels, 12, notes=("a note with <s> in it",), **ends)


def lens() -> LogitLens:
    shares = random(0, 1, 3, 7).softmax(-1).sort(descending=True).values
    ids, tokens = torch.arange(21).view(1, 3, 7), ((HOSTILE,) * 3,)
    return LogitLens(
        "tiny", (LensPosition(0, 4, "<s>"),), ("embed", 0, 1), ids, tokens, random(1, 1, 3, 7), shares
    )


def flow() -> HeadNeuronFlow:
    feeds = random(0, 3, 5).abs().double()
    promoted = tuple(
        tuple(PromotedToken(HOSTILE[(i + j) % len(HOSTILE)], 2.0 - j) for j in range(2)) for i in range(5)
    )
    return HeadNeuronFlow(
        task=TASK,
        model_name="tiny-llava",
        heads=tuple(Component(i, 1, 0.1) for i in range(3)),
        neurons=tuple(Component(i % 3, 100 + i, float(feeds[:, i].sum())) for i in range(5)),
        contributions=feeds,
        total=2 * float(feeds.sum()),
        activations=random(1, 5).double(),
        promoted=promoted,
        n_examples=60,
    )


@cache
def attention() -> HeadAttention:
    both, inputs, _ = twin(random_llava)
    return replace(head_attention(both.model, inputs, HEADS, row=ROW), source="position 3, <image>")


@cache
def folded() -> FoldedAttention:
    both, inputs, _ = twin(random_llava)
    found = folded_attention(both.model, inputs, HEADS[:1], row=ROW)
    names = (*HOSTILE, *found.cells.names[len(HOSTILE) :])
    return replace(found, cells=replace(found.cells, names=names), model_name=TASK)


def on_image() -> Plot:
    _, inputs, _ = twin(random_llava)
    names = tuple(f"{i} <s>" for i in range(inputs.input_ids.shape[1]))
    result = with_ends("restored at '<s>'", ("layer", "position"), (2, len(names)), position=names)
    return viz.on_image(result, inputs, pictures()[1], row=ROW, image=1)


def image_lens() -> Plot:
    result = Labelled("log-prob of '</script>' by the lens", random(2, 2, 2, 4), ("layer", "row", "column"))
    return viz.image_lens(result, Image.new("RGB", (60, 40), "#123456"), (10.0, 0.0, 50.0, 40.0))


def cell_values() -> Plot:
    n = folded().cells.inputs.input_ids.shape[1]
    return viz.cell_values(folded().cells, random(3, n), what="activation of <L0N1>")


_POSITIONS = tuple(f"{i} {token}" for i, token in enumerate(HOSTILE))
_EDGES = ("image → <s>", "image → question", "question → last")

VIEWS: dict[str, Callable[[], Plot]] = {
    "agreement_scatter": lambda: shared.agreement().plot(),
    "attention_maps": lambda: attention().plot(pictures()),
    "attention_over_image": lambda: viz.attention_over_image(
        made.image((160, 112)), made.attention(), "from <s>", region=(24.0, 0.0, 136.0, 112.0)
    ),
    "cell_patterns": lambda: folded().plot(),
    "cell_values": cell_values,
    "direct_bars": lambda: viz.direct_bars(
        with_ends("added to the logit of '<s>' by each head", ("layer", "head"), (3, 6)), k=8
    ),
    "evaluation_dots": lambda: shared.evaluation(TASK).plot(),
    "group_masking_bars": lambda: viz.group_masking_bars(shared.groups(("vqa", "ocr"))),
    "head_heatmap": lambda: viz.head_heatmap(replace(made.heads(), task=TASK)),
    "head_neuron_token_flow": lambda: flow().plot(),
    "held_out_bars": lambda: replace(shared.held_out(), task=TASK).plot(),
    "image_lens": image_lens,
    "kinds_bars": lambda: viz.kinds_bars(made.masking(task=TASK)),
    "knockout_curves": lambda: viz.knockout_curves(
        with_ends("change of the probability when '<s>' is out", ("layer", "edge"), (4, 3), edge=_EDGES)
    ),
    "labelled": lambda: viz.labelled(
        with_ends("restored at '</script>'", ("layer", "position"), (4, 7), position=_POSITIONS)
    ),
    "lens_changes": lambda: shared.lens().plot(),
    "lens_grid": lambda: lens().plot(k=7),
    "masking_bars": lambda: viz.masking_bars(made.masking(task=TASK)),
    "masking_curve": lambda: viz.masking_curve([made.masking(task=TASK)]),
    "neurons_per_layer": lambda: viz.neurons_per_layer([made.neurons(task=TASK), made.neurons(task="ocr")]),
    "on_image": on_image,
    "overlap_layers": lambda: viz.overlap_layers(shared.shared()),
    "overlap_shared": lambda: viz.overlap_shared(shared.shared()),
    "overlap_sizes": lambda: viz.overlap_sizes(shared.shared()),
    "ranking_bars": lambda: viz.ranking_bars({"<hones>": made.masking(), "direct": made.masking(0.88, -0.4)}),
    "ranking_scatter": lambda: shared.rankings().plot(),
    "scale_dots": lambda: replace(shared.scales(), task=TASK).plot(),
    "side_effect_bars": lambda: viz.side_effect_bars(shared.effects()),
    "steering_bars": lambda: viz.steering_bars(shared.steering()),
}


def settled(name: str) -> Plot:
    """The view after its layout was made, which then stays: drawing it again takes half the time."""
    figure = VIEWS[name]()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


# What each shows of tokens and names, as a reader sees it; white space and missing glyphs are escapes.
SHOWN: dict[str, tuple[str, ...]] = {
    "agreement_scatter": ("z by <AtP*>",),
    "attention_maps": ("Attention from position 3, <image>",),
    "attention_over_image": ("from <s>",),
    "cell_patterns": (*HOSTILE[:6], TASK),
    "cell_values": (*HOSTILE[:6], "activation of <L0N1>"),
    "direct_bars": ("'<s>'", "a note with <s> in it"),
    "evaluation_dots": (TASK, "<count>"),
    "head_heatmap": (TASK,),
    "head_neuron_token_flow": (*HOSTILE[:6], TASK),
    "held_out_bars": (TASK,),
    "image_lens": ("'</script>'",),
    "kinds_bars": (TASK,),
    "knockout_curves": ("image → <s>", "a note with <s> in it"),
    "labelled": (*_POSITIONS[:6], "'</script>'", "a note with <s> in it"),
    "lens_changes": ("layer 2: <b>", "layer 2: </s>"),
    "lens_grid": (*HOSTILE[:6], "4 of row 0, <s>"),
    "masking_bars": (TASK,),
    "masking_curve": (TASK,),
    "neurons_per_layer": (TASK,),
    "on_image": ("Restored at '<s>'", "a note with <s> in it"),
    "ranking_bars": ("<hones>",),
    "ranking_scatter": ("<mean>",),
    "scale_dots": (TASK, "<HONES>"),
}
