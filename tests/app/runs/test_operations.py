"""The formulas of `--plan` beside what PyTorch counts while the same things run."""

from __future__ import annotations

import pytest
import torch
from helpers import random_gemma, random_llava
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hones_lens.app.runs.operations import Operations, Segment
from hones_lens.engine import Segment as EngineSegment, Sweep
from hones_lens.interventions import replace_with_other_heads_mean, zero_neurons
from hones_lens.model import HookedVLM

# That of Gemma has norms behind attention and MLP, so that no fork is shortened.
MODELS = ("tiny-llava", "tiny-qwen2.5-vl", "gemma3")


def counted(run) -> float:
    """What PyTorch counts; attention by its two products, as the formulas have it."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> HookedVLM:
    if request.param != "gemma3":
        return HookedVLM.from_pretrained(request.param)
    text = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return random_gemma.make_pair(random_gemma.make_config(text={**text, "intermediate_size": 96}))[1]


@pytest.fixture
def inputs(model):
    return model.prepare(random_llava.make_images(1), ["what color is the circle?"])


def test_pictures_and_forward_passes(model, inputs):
    count, tokens = Operations(model), inputs.input_ids.shape[1]
    (rows, columns), merge = inputs.grids[0][0], model.cfg.vision.merge_size
    picture = counted(lambda: model.encode_images(inputs))
    assert count.picture(rows * merge, columns * merge) == pytest.approx(picture, rel=0.03)
    encoded = model.with_image_embeds(inputs)
    for keep, layers in ((1, None), (tokens, None), (1, 2)):
        stop = {} if layers is None else {"stop_at_layer": layers}
        run = counted(lambda keep=keep, stop=stop: model(encoded, logits_to_keep=keep, **stop))
        assert count.forward(tokens, keep, layers) == pytest.approx(run, rel=0.02)


def test_decoding(model, inputs):
    count, tokens, encoded = Operations(model), inputs.input_ids.shape[1], model.with_image_embeds(inputs)
    run = counted(lambda: model.generate(encoded, max_new_tokens=6, return_type="tokens"))
    said = model.generate(encoded, max_new_tokens=6, return_type="tokens").shape[1]
    assert count.forward(tokens) + count.decode(tokens, said - 1) == pytest.approx(run, rel=0.02)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_forks(model, inputs, layer, kind):
    count, tokens, keep = Operations(model), inputs.input_ids.shape[1], 3
    encoded = model.with_image_embeds(inputs)
    if kind == "heads":
        arms = [[replace_with_other_heads_mean(layer, head)] for head in range(model.cfg.n_heads)]
    else:
        arms = [zero_neurons([(layer, i)]) for i in range(4)]
    sweep, segments = Sweep(model, [[], *arms]), [EngineSegment.of(model, encoded, keep)]
    numbers = list(range(len(arms) + 1))
    run = counted(lambda: list(sweep.forks_of(segments, numbers)))
    planned = [Segment(1, tokens, 0, keep)]
    forks = len(arms) * count.fork(layer, planned, heads=kind == "heads")
    tables = count.head_tables() if kind == "heads" else 0
    assert count.clean(planned) + tables + forks == pytest.approx(run, rel=0.03)
