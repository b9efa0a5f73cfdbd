"""Learned scales against Hugging Face's model with scaled neurons; planted neurons; broken-off learnings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hf_scaled_neurons import CHOSEN, FAST, QUIET, hf_scaled
from helpers.hf_task_loops import (
    D_MLP,
    FAMILIES,
    N_LAYERS,
    answer_ids,
    examples_of,
    fresh_pair,
    hf_inputs,
    pair,
    plain_examples,
)
from torch import Tensor

from hones_lens import engine
from hones_lens.data.loading import load_examples
from hones_lens.engine import SweepOptions
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.steering import learning as learning_module
from hones_lens.hones.steering.batches import TrainingBatches, frozen_parameters, gradient_of_step
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.hones.steering.learning import learn_scales
from hones_lens.hones.steering.questions import (
    answer_log_probs,
    check_disjoint_images,
    image_key,
    labelled_prompts,
    split_by_image,
)
from hones_lens.hones.steering.scales import NeuronScales, scaling_hooks
from hones_lens.interventions.hooks import scale
from hones_lens.tasks.registry import load_task

# -- the model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_offsets_are_the_base_to_the_bit(family: str) -> None:
    _, model = pair(family)
    examples = plain_examples("vqa")
    inputs = model.prepare([e.image for e in examples], [load_task("vqa").prompts(e)[0] for e in examples])
    hooks = NeuronScales.uniform(CHOSEN, 1.0).hooks()
    with torch.no_grad():
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=hooks), model(inputs))
        other = NeuronScales.uniform(CHOSEN, 1.5).hooks()
        assert not torch.equal(model.run_with_hooks(inputs, fwd_hooks=other), model(inputs))


def test_small_offsets_survive_bfloat16() -> None:
    x = (2 + 2 * torch.rand(1, 5000, 2)).bfloat16()
    (_, fn), a = scale("m", [1], torch.tensor([1.003])), 0.003
    out = fn(x, None)
    assert out.dtype == x.dtype and torch.equal(out[..., 0], x[..., 0])
    moved = (out[..., 1].double() / x[..., 1].double() - 1).mean()
    assert abs(float(moved) - a) < 0.3 * a, "1 + a in bfloat16 would be 1"


# -- the loss and its gradient -------------------------------------------------------------------------


def hf_loss(hf_model: Any, model: Any, name: str, asked: list, a: Tensor, config: SteeringConfig) -> Tensor:
    """HONES eq. H5 in plain loops over Hugging Face's logits, one prompt at a time."""
    total = config.l2_weight * (a * a).sum() / len(a)
    factors = {neuron: 1 + a[i] for i, neuron in enumerate(CHOSEN)}
    for prompt, answer, example, weight in asked:
        ids = answer_ids(model, example.image, prompt, answer)
        inputs = hf_inputs(model, example.image, prompt, answer)
        with torch.no_grad():
            original = hf_model(**inputs).logits[0, -len(ids) - 1 : -1].softmax(-1)
        with hf_scaled(hf_model, factors):
            steered = hf_model(**inputs).logits[0, -len(ids) - 1 : -1].softmax(-1)
        for k, token in enumerate(ids):
            kl = (original[k] * (original[k] / steered[k]).log()).sum()
            total = total + weight * (-steered[k, token].log() + config.kl_weight * kl) / len(ids)
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["vqa", "caption", "retrieval"])
def test_loss_and_gradient_equal_hf(name: str, family: str) -> None:
    hf_model, model = pair(family)
    task, examples = load_task(name), list(plain_examples(name, 2))
    config = SteeringConfig(kl_weight=0.7, l2_weight=0.3, negatives=2, accumulate=2)
    a = torch.tensor([0.3, -0.2, 0.5, 0.1, -1.3], requires_grad=True)
    batches = TrainingBatches(model, task, examples, 1, config, batch_size=3)
    with frozen_parameters(model), torch.no_grad():
        found, parts = gradient_of_step(model, batches, 0, CHOSEN, a, config)
    asked = []
    for example in examples:
        mine = labelled_prompts(task, [example], 2, 0)[0]
        asked += [(q.prompt, q.answer, example, q.weight / len(examples)) for q in mine]
    loss = hf_loss(hf_model, model, name, asked, a, config)
    (expected,) = torch.autograd.grad(loss, a)
    assert abs(parts["loss"] - float(loss.detach())) < 1e-5
    assert parts["kl"] > 0
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert (expected.abs() > 1e-4).all(), "nothing to compare"


def test_at_zero_the_divergence_and_its_gradient_vanish() -> None:
    _, model = pair()
    config = SteeringConfig(kl_weight=5.0)
    batches = TrainingBatches(model, load_task("vqa"), list(plain_examples("vqa", 2)), 1, config)
    a = torch.zeros(len(CHOSEN), requires_grad=True)
    found, parts = gradient_of_step(model, batches, 0, CHOSEN, a, config)
    without, _ = gradient_of_step(model, batches, 0, CHOSEN, a, replace(config, kl_weight=0.0))
    assert parts["kl"] == 0 and torch.allclose(found, without, atol=1e-6)


# -- learning ------------------------------------------------------------------------------------------


def planted() -> tuple[Any, list, tuple[int, int]]:
    """A model with one neuron of the top layer that never is negative and writes an answer's first token."""
    _, model = fresh_pair(seed=3)
    examples = [replace(e, answers=("red",)) for e in plain_examples("vqa", 4)]
    neuron = (N_LAYERS - 1, 4)
    prompt = load_task("vqa").prompts(examples[0])[0]
    token = model.continuation(prompt, "red")[0]
    with torch.no_grad():
        mlp = model.blocks[neuron[0]].mlp
        mlp.W_in[:, 4] = mlp.W_gate[:, 4]  # m = silu(g) · g, which is never negative
        direction = model.W_U[:, token] - model.W_U.mean(-1)
        mlp.W_out[4] = 3 * direction / direction.norm()
    return model, examples, neuron


def test_a_planted_neuron_is_turned_up_to_where_the_loss_is_least() -> None:
    model, examples, neuron = planted()
    task = load_task("vqa")
    config = SteeringConfig(lr=0.1, epochs=30, l2_weight=0.0, kl_weight=0.0)
    scales = learn_scales(model, "vqa", examples, [neuron], config, **QUIET)
    tried = np.linspace(-1.5, 1.5, 61)
    arms = [NeuronScales.uniform([neuron], 1 + a).hooks() for a in tried]
    arms += [scales.hooks(), []]
    likely = answer_log_probs(model, task, examples, arms, SweepOptions(**QUIET)).mean(-1)
    best = tried[likely[:-2].argmax()]
    assert scales.offsets[0] > 0.2 and abs(scales.offsets[0] - best) < 0.06
    assert likely[-2] > likely[-1] + 0.01 and likely[-2] > likely[:-2].max() - 1e-3
    step = 1e-2  # and the first gradient is the finite difference
    batches = TrainingBatches(model, task, examples, neuron[0], config)
    (slope,), _ = gradient_of_step(model, batches, 0, [neuron], torch.zeros(1, requires_grad=True), config)
    ends = [NeuronScales.uniform([neuron], 1 + a).hooks() for a in (-step, step)]
    n_tokens = len(model.continuation(task.prompts(examples[0])[0], "red"))
    low, high = answer_log_probs(model, task, examples, ends, SweepOptions(**QUIET)).mean(-1) / n_tokens
    assert abs(-float(slope) - (high - low) / (2 * step)) < 2e-3 * max(1, abs(float(slope)))


def test_the_model_is_left_as_it_was() -> None:
    _, model = pair()
    frozen_one = model.blocks[0].mlp.up.weight
    frozen_one.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    try:
        with torch.no_grad():
            scales = learn_scales(model, "vqa", list(plain_examples("vqa")), CHOSEN, FAST, **QUIET)
    finally:
        frozen_one.requires_grad_(True)
    assert scales.max_abs > 0
    for name, parameter in model.named_parameters():
        asked, value = before[name]
        assert torch.equal(parameter, value) and parameter.grad is None
        assert parameter.requires_grad == asked or name.endswith("blocks.0.mlp.up.weight")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_adam_clamp_and_history() -> None:
    _, model = pair()
    examples = list(plain_examples("vqa"))
    first = learn_scales(model, "vqa", examples, CHOSEN, replace(FAST, accumulate=3, epochs=1), **QUIET)
    assert np.allclose(np.abs(first.offsets), FAST.lr, rtol=1e-3), "Adam's first step is its learning rate"
    tight = learn_scales(model, "vqa", examples, CHOSEN, replace(FAST, lr=0.5, clamp=0.2), **QUIET)
    assert math.isclose(tight.max_abs, 0.2, rel_tol=1e-6)
    assert [h["epoch"] for h in tight.history] == [1, 2] and tight.n_examples == 3
    assert all(h["loss"] > 0 and h["kl"] >= 0 and h["max_abs"] <= 0.2 + 1e-6 for h in tight.history)


def test_memory_and_passes_do_not_change_what_is_learned() -> None:
    _, model = pair()
    examples = list(plain_examples("vqa"))
    whole = learn_scales(model, "vqa", examples, CHOSEN, FAST, **QUIET)
    assert learn_scales(model, "vqa", examples, CHOSEN, FAST, memory_budget=1e-9, **QUIET) == whole
    single = learn_scales(model, "vqa", examples, CHOSEN, FAST, batch_size=1, **QUIET)
    assert np.allclose(single.offsets, whole.offsets, atol=1e-4)
    other = learn_scales(model, "vqa", examples, CHOSEN, replace(FAST, seed=1), **QUIET)
    assert other.offsets != whole.offsets


def test_a_ranking_is_cut_at_its_ratio() -> None:
    _, model = pair()
    ranking = torch.zeros(N_LAYERS, D_MLP, dtype=torch.float64)
    for rank, cell in enumerate(CHOSEN):
        ranking[cell] = 10 - rank
    scores = NeuronScores("vqa", "hones", "m", ranking, ratio=0.05, n_examples=2)
    examples = list(plain_examples("vqa", 2))
    found = learn_scales(model, "vqa", examples, scores, FAST, **QUIET)
    assert list(found.neurons) == CHOSEN[:3] and found.method == "hones"
    assert len(learn_scales(model, "vqa", examples, scores, FAST, k=5, **QUIET).neurons) == 5


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_a_killed_learning_goes_on_to_the_same_bits(killed_after: int, tmp_path, monkeypatch) -> None:
    _, model = pair()
    examples, dev = list(plain_examples("vqa", 5))[:4], list(plain_examples("vqa", 5))[4:]
    config = replace(FAST, epochs=2)
    options = {"dev": dev if killed_after == 3 else None, "save_every": 1, **QUIET}
    unbroken = learn_scales(model, "vqa", examples, CHOSEN, config, **options)
    file, real, taken = tmp_path / "learning.json", gradient_of_step, []

    def broken(*args: Any) -> Any:
        if len(taken) == killed_after:
            raise Killed
        taken.append(1)
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(learning_module, "gradient_of_step", broken)
        learn_scales(model, "vqa", examples, CHOSEN, config, checkpoint=file, **options)
    assert json.loads(file.read_text())["done"] == killed_after
    resumed = learn_scales(model, "vqa", examples, CHOSEN, config, checkpoint=file, **options)
    assert resumed == unbroken
    again = learn_scales(model, "vqa", examples, CHOSEN, config, checkpoint=file, **options)
    assert again == unbroken, "a finished learning is read, not run"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    _, model = pair()
    file, examples = tmp_path / "learning.json", list(plain_examples("vqa", 2))
    learn_scales(model, "vqa", examples, CHOSEN, FAST, checkpoint=file, **QUIET)
    with pytest.raises(ValueError, match=r"lr: 0\.05 there, 0\.01 now"):
        learn_scales(model, "vqa", examples, CHOSEN, replace(FAST, lr=0.01), checkpoint=file, **QUIET)
    with pytest.raises(ValueError, match="neurons: "):
        learn_scales(model, "vqa", examples, CHOSEN[:2], FAST, checkpoint=file, **QUIET)
    with pytest.raises(ValueError, match="examples: "):
        learn_scales(model, "vqa", examples[:1], CHOSEN, FAST, checkpoint=file, **QUIET)


def test_the_best_on_dev_is_kept_and_patience_ends(monkeypatch) -> None:
    _, model = pair()
    examples = list(plain_examples("vqa", 4))
    values = iter([(0.5, -1.0), (0.5, -0.5), (0.5, -0.7), (0.4, 0.0), (0.9, 0.0)])
    seen = []

    def pretend(offsets: Any) -> tuple[float, float]:
        seen.append(tuple(offsets))
        return next(values)

    monkeypatch.setattr(learning_module, "dev_measurement", lambda *_: pretend)
    config = replace(FAST, epochs=8)
    found = learn_scales(model, "vqa", examples[:2], CHOSEN, config, dev=examples[2:], patience=2, **QUIET)
    assert seen[0] == (0.0,) * len(CHOSEN) and len(seen) == 4 == len(found.history) + 1
    assert found.offsets == seen[1] and found.history[0]["dev_log_prob"] == -0.5


def test_dev_is_measured_as_the_sweep_does() -> None:
    _, model = pair()
    task = load_task("vqa")
    examples, dev = list(examples_of("vqa", 4))[:2], list(examples_of("vqa", 4))[2:]
    found = learn_scales(model, "vqa", examples, CHOSEN, replace(FAST, epochs=1), dev=dev, **QUIET)
    last = found.history[0]
    base = [o.metric(task) for o in engine.measure(model, task, dev, [[]], SweepOptions(**QUIET))]
    likely = engine.measure_log_probs(model, task, dev, [[]], SweepOptions(**QUIET))
    kept = (last["dev_metric"], last["dev_log_prob"]) > (base[0], np.mean(likely[0]))
    assert found.max_abs == (last["max_abs"] if kept else 0.0)


def test_a_loss_that_is_not_finite_names_the_examples() -> None:
    _, model = fresh_pair(seed=1)
    with torch.no_grad():
        model.blocks[2].mlp.W_out[3] = torch.inf
    examples = list(plain_examples("vqa", 2))
    with pytest.raises(FloatingPointError, match=f"the loss is nan .*{examples[0].id}"):
        learn_scales(model, "vqa", examples, CHOSEN, FAST, **QUIET)


def test_bad_input() -> None:
    _, model = pair()
    examples = list(plain_examples("vqa", 2))
    for given, message in (
        ([], "no neurons to steer"),
        ([(N_LAYERS, 0)], f"neuron L{N_LAYERS}N0 does not exist"),
        ([(0, -1)], "neuron L0N-1 does not exist"),
        ([(1, 2), (1, 2)], "neuron L1N2 occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_scales(model, "vqa", examples, given, **QUIET)
    with pytest.raises(ValueError, match="no examples"):
        learn_scales(model, "vqa", [], CHOSEN, **QUIET)
    with pytest.raises(ValueError, match="patience needs dev"):
        learn_scales(model, "vqa", examples, CHOSEN, patience=1, **QUIET)
    with pytest.raises(ValueError, match="shows the picture of"):
        learn_scales(model, "vqa", examples, CHOSEN, dev=examples[:1], **QUIET)
    with pytest.raises(ValueError, match="2 factors for 1 neurons"):
        scaling_hooks([(0, 1)], torch.ones(2))


@pytest.mark.parametrize(
    "wrong",
    "lr=0 lr=inf epochs=0 accumulate=0 kl_weight=-1 clamp=0 l2_weight=nan grad_norm=-1 "
    "final_lr=1.5 negatives=0".split(),
)
def test_settings_are_checked(wrong: str) -> None:
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=name):
        SteeringConfig(
            **{name: int(value) if name in ("epochs", "accumulate", "negatives") else float(value)}
        )


def test_defaults_are_the_papers() -> None:
    config = SteeringConfig()
    assert (config.lr, config.epochs, config.accumulate, config.clamp) == (5e-4, 2, 4, 1.5)
    assert (config.kl_weight, config.l2_weight, config.grad_norm) == (0.05, 1e-5, 1.0)
    rates = [config.learning_rate(step, 10) for step in range(11)]
    assert math.isclose(rates[0], 5e-4) and math.isclose(rates[10], 5e-5) and math.isclose(rates[5], 2.75e-4)


# -- what is asked -------------------------------------------------------------------------------------


def test_a_ranking_task_learns_yes_and_no_alike() -> None:
    task, (example,) = load_task("retrieval"), load_examples("shapes", "retrieval", "dev", limit=1)
    asked = labelled_prompts(task, [example], 3, 0)[0]
    assert [q.answer for q in asked] == ["Yes", "No", "No", "No"]
    assert asked[0].prompt == task.target_prompt(example)
    assert len({q.prompt for q in asked}) == 4 and {q.prompt for q in asked} <= set(task.prompts(example))
    assert math.isclose(sum(q.weight for q in asked[1:]), 0.5) and asked[0].weight == 0.5
    other = load_examples("shapes", "retrieval", "test", limit=1)[0]
    assert (
        labelled_prompts(task, [other, example], 3, 0)[1]
        == asked
        != labelled_prompts(task, [example], 3, 1)[0]
    )
    assert len(labelled_prompts(task, [example], 999, 0)[0]) == len(set(task.prompts(example)))
    alone = replace(example, candidates=example.candidates[:1], positive=0)
    with pytest.raises(ValueError, match="no wrong candidate"):
        labelled_prompts(task, [alone], 3, 0)


@pytest.mark.parametrize("name", ["vqa", "retrieval"])
def test_log_probability_of_right_answers(name: str) -> None:
    _, model = pair()
    task, examples = load_task(name), list(plain_examples(name))
    arms = [[], NeuronScales.uniform(CHOSEN, 2.0).hooks()]
    journal: dict[str, Any] = {}
    options = SweepOptions(batch_size=8, journal=journal, **QUIET)
    found = answer_log_probs(model, task, examples, arms, options)
    for i, example in enumerate(examples):
        for arm, hooks in enumerate(arms):
            expected = 0.0
            for query in labelled_prompts(task, [example], 3, 0)[0]:
                inputs = model.prepare([example.image], [query.prompt], [query.answer])
                with model.hooks(fwd_hooks=hooks):
                    expected += query.weight * float(model.log_probs(inputs))
            assert abs(found[arm, i] - expected) < 1e-4
    assert journal
    assert (answer_log_probs(model, task, examples, arms, options) == found).all()


def test_dev_is_cut_by_picture() -> None:
    drawn = load_examples("shapes", "vqa", "dev", limit=12)
    examples = [replace(e, id=f"{e.id}/{i}") for e in drawn for i in range(2)]
    learn, choose = split_by_image(examples, 0.7, 0)
    assert len(learn) == 16 and len(choose) == 8
    assert not {image_key(e) for e in learn} & {image_key(e) for e in choose}
    assert {e.id for e in learn} | {e.id for e in choose} == {e.id for e in examples}
    assert [e.id for e in split_by_image(examples, 0.7, 0)[0]] == [e.id for e in learn]
    assert [e.id for e in split_by_image(examples, 0.7, 1)[0]] != [e.id for e in learn]
    check_disjoint_images({"learning": learn, "dev": choose})
    with pytest.raises(
        ValueError, match=f"dev example .* shows the picture of learning example '{examples[0].id}'"
    ):
        check_disjoint_images({"learning": examples[:1], "dev": examples[1:2]})
    with pytest.raises(ValueError, match="can't be cut in two"):
        split_by_image(examples[:2], 0.5, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_image(examples, 1.0, 0)
    named = [replace(e, facts={"image_id": "one"}) for e in drawn[:2]]
    assert image_key(named[0]) == image_key(named[1]) == "one"


# -- files ---------------------------------------------------------------------------------------------


def test_scales_files(tmp_path) -> None:
    _, model = pair()
    found = learn_scales(model, "vqa", list(plain_examples("vqa", 2)), CHOSEN, FAST, **QUIET)
    found.save(tmp_path / "scales.json")
    assert NeuronScales.load(tmp_path / "scales.json") == found
    found.save_hones(tmp_path / "neuron_scales.json")
    records = json.loads((tmp_path / "neuron_scales.json").read_text())
    assert records[0] == {"layer": 1, "neuron": 5, "scale": 1 + found.offsets[0]}
    theirs = NeuronScales.load(tmp_path / "neuron_scales.json")
    assert theirs.neurons == found.neurons and torch.equal(theirs.factors, found.factors)
    (tmp_path / "bad.json").write_text('[{"layer": 1, "neuron": 2}]')
    with pytest.raises(ValueError, match=r"bad\.json: record 0 is not of the form"):
        NeuronScales.load(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"kind": "heads"}')
    with pytest.raises(ValueError, match=r"other\.json holds 'heads', not 'scales'"):
        NeuronScales.load(tmp_path / "other.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        NeuronScales.load(tmp_path / "no.json")


def test_scales_print_and_refuse() -> None:
    scales = NeuronScales(tuple(CHOSEN), (0.1, -0.4, 0.0, 0.2, 0.3))
    assert scales.max_abs == 0.4 and "max |a| 0.4" in repr(scales) and "L2N0" in str(scales).splitlines()[1]
    assert "<table" in scales._repr_html_() and scales.to_dataframe()["scale"][1] == 0.6
    assert [name for name, _ in scales.hooks()] == ["blocks.1.mlp.hook_post", "blocks.2.mlp.hook_post"]
    with pytest.raises(ValueError, match="occurs twice"):
        NeuronScales(((1, 2), (1, 2)), (0.1, 0.2))
    with pytest.raises(ValueError, match="1 offsets for 2 neurons"):
        NeuronScales(((1, 2), (1, 3)), (0.1,))
    with pytest.raises(ValueError, match="no components"):
        NeuronScales((), ()).hooks()
