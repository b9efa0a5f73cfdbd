"""Memory stays within the budget, whatever the batch; parts that run out of it run again, in halves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.allocations import Allocations
from helpers.hf_task_loops import N_HEADS, N_LAYERS, examples_of, pair

import hones_lens as hl
from hones_lens import HookedVLM, engine
from hones_lens.analysis.patching import batches as patching_batches
from hones_lens.engine import Budget, SweepOptions, forks, speculation
from hones_lens.hones.attribution import gradients
from hones_lens.hones.attribution.neurons import write_in
from hones_lens.hones.steering import batches as steering
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.interventions.hooks import replace_with_other_heads_mean
from hones_lens.model import Allowance, bounded_by
from hones_lens.tasks import load_task

FAMILIES = ("llava", "qwen")
QUIET = SweepOptions(progress=False)
HEADS = [[replace_with_other_heads_mean(layer, h)] for layer in range(N_LAYERS) for h in range(N_HEADS)]


def batch_of(model: HookedVLM, n: int) -> engine.Batch:
    """VQA prompts with their answers, encoded."""
    (batch,) = engine.answer_batches(model, load_task("vqa"), hl.load_examples("shapes", "vqa", "test", n), n)
    return batch


def encode(model: HookedVLM, batch: engine.Batch) -> torch.Tensor:
    embeds = model.with_image_embeds(replace(batch.inputs, image_embeds=None)).image_embeds
    assert embeds is not None
    return embeds


def head_drops(model: HookedVLM, batch: engine.Batch) -> torch.Tensor:
    options = {"batch_size": len(batch.examples), "progress": False}
    return gradients.first_order_head_drops(model, load_task("vqa"), batch.examples, **options)


def neuron_drops(model: HookedVLM, batch: engine.Batch) -> torch.Tensor:
    options = {"batch_size": len(batch.examples), "progress": False}
    return gradients.gradient_times_activation(model, load_task("vqa"), batch.examples, **options)


def write_ins(model: HookedVLM, batch: engine.Batch) -> torch.Tensor:
    return write_in(model, batch, torch.ones(len(batch.examples), model.cfg.d_model))


# What runs, and how much of it fits into the memory of two rows.
WORK: dict[str, Callable[[HookedVLM, engine.Batch], torch.Tensor]] = {
    "vision": encode,
    "heads by gradients": head_drops,
    "neurons by gradients": neuron_drops,
    "neurons by write-in": write_ins,
}


def peak(work: Callable[..., torch.Tensor], model: HookedVLM, n: int) -> tuple[int, torch.Tensor]:
    """Bytes beside those of the batch and of the result, and the result."""
    batch = batch_of(model, n)
    with Allocations() as made:
        out = work(model, batch)
    return made.peak - made.live, out


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WORK)
def test_the_peak_stays_where_it_is_while_the_batch_grows(name: str, family: str) -> None:
    model, work = pair(family)[1], WORK[name]
    needed, _ = peak(work, model, 2)
    unbounded, expected = peak(work, model, 12)
    assert unbounded > 3 * needed, "there is nothing to bound"
    budget = 2.2 * needed / 1e9  # what is estimated lies above what is needed
    with bounded_by(budget):
        bounded = [peak(work, model, n) for n in (4, 8, 12)]
    assert max(size for size, _ in bounded) <= budget * 1e9
    torch.testing.assert_close(bounded[-1][1], expected, rtol=1e-4, atol=1e-6)


@contextmanager
def scarce(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, size: Callable[..., int]
) -> Iterator[list]:
    """A function that runs out of memory for more than one, as long as the block lasts."""
    true, sizes = getattr(owner, name), []

    def run(*args: Any, **options: Any) -> Any:
        sizes.append(size(*args))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("not enough memory: you tried to allocate 1 byte")
        return true(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, run)
        yield sizes


def test_images_are_encoded_again_in_halves(monkeypatch) -> None:
    for family in FAMILIES:
        model = pair(family)[1]
        batch = batch_of(model, 5)
        expected = encode(model, batch)
        with scarce(monkeypatch, type(model), "encode_images", lambda self, inputs: len(inputs)) as sizes:
            torch.testing.assert_close(encode(model, batch), expected, rtol=1e-5, atol=1e-6)
        assert sizes == [5, 2, 1, 1, 1, 1, 1]


def test_rows_of_several_images_and_of_none_are_encoded_in_parts() -> None:
    for family in FAMILIES:
        model = pair(family)[1]
        a, b, c = (example.image for example in hl.load_examples("shapes-varied", "vqa", "test", 3))
        inputs = model.prepare([None, [a, b], c], ["Hello.", "Two?", "One?"])
        whole = model.with_image_embeds(inputs).image_embeds
        with bounded_by(1e-9):
            torch.testing.assert_close(model.with_image_embeds(inputs).image_embeds, whole)


def test_hooks_of_the_tower_see_all_images_at_once() -> None:
    model = pair()[1]
    batch, seen = batch_of(model, 4), []
    with bounded_by(1e-9), model.hooks([("vision_encoder.blocks.0.hook_resid_pre", lambda x, hook: None)]):
        model.hook_dict["vision_encoder.blocks.0.hook_resid_pre"].add_hook(
            lambda x, hook: seen.append(len(x))
        )
        encode(model, batch)
        model(replace(batch.inputs, image_embeds=None))
    model.reset_hooks()
    assert seen == [4, 4]


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["ocr", "retrieval"])
def test_a_clean_walk_that_runs_out_of_memory_is_walked_again(task: str, monkeypatch) -> None:
    model, known, examples = pair()[1], load_task(task), examples_of(task)
    expected = [o.scores for o in engine.measure(model, known, examples, HEADS[:6], QUIET)]
    log_probs = engine.measure_log_probs(model, known, examples, HEADS[:6], QUIET)
    ticks: list[int] = []
    size = lambda model, layer, before, context: len(before) if layer == 2 else 1  # noqa: E731
    with scarce(monkeypatch, forks, "_step", size) as sizes:
        assert [o.scores for o in engine.measure(model, known, examples, HEADS[:6], QUIET)] == expected
        again = engine.measure_log_probs(model, known, examples, HEADS[:6], QUIET)
        torch.testing.assert_close(torch.tensor(again), torch.tensor(log_probs))
        sweep = engine.Sweep(model, HEADS[:6], QUIET, ticks.append)
        for batch in engine.prompt_batches(model, known, examples, 3):
            sweep.predictions(known, batch)
    assert max(sizes) > 1 and min(ticks) < 0 and sum(ticks) == 6 * len(examples)


@pytest.mark.exhaustive
def test_rows_that_decode_have_fewer_slots_and_steps_in_halves(monkeypatch) -> None:
    model, known, examples = pair()[1], load_task("ocr"), examples_of("ocr")
    tally = [speculation.Tally() for _ in range(3)]
    options = [replace(QUIET, tally=each) for each in tally]
    expected = [o.scores for o in engine.measure(model, known, examples, HEADS, options[0])]
    slots = speculation._Slots
    with scarce(monkeypatch, slots, "of", lambda model, count, size: count // 3) as sizes:
        assert [o.scores for o in engine.measure(model, known, examples, HEADS, options[1])] == expected
    assert max(sizes) > 1 and tally[0].decoded == tally[1].decoded > 6
    with scarce(
        monkeypatch, speculation.Answers, "_next_tokens", lambda self, rows, part: len(part)
    ) as sizes:
        assert [o.scores for o in engine.measure(model, known, examples, HEADS, options[2])] == expected
    assert max(sizes) > 1 and tally[2].row_layers == tally[0].row_layers


@pytest.mark.parametrize("name", ["heads by gradients", "neurons by gradients"])
def test_gradients_that_run_out_of_memory_are_taken_again(name: str, monkeypatch) -> None:
    model, work = pair("qwen")[1], WORK[name]
    batch = batch_of(model, 5)
    expected = work(model, batch)
    with scarce(monkeypatch, gradients, "_gradients_at", lambda model, inputs, names: len(inputs)) as sizes:
        torch.testing.assert_close(work(model, batch), expected, rtol=1e-4, atol=1e-7)
    assert sizes[0] == 5 and sizes[-5:] == [1] * 5


def step_of(model: HookedVLM, n: int) -> Callable[[], torch.Tensor]:
    """The gradient and the loss of one step of learning scales, of so many rows, clean passes done."""
    examples = hl.load_examples("shapes", "vqa", "test", n)
    neurons, config = [(0, 3), (N_LAYERS - 1, 5)], SteeringConfig(accumulate=n, l2_weight=0.0)
    batches = steering.TrainingBatches(model, load_task("vqa"), examples, 0, config, batch_size=n)
    a = torch.tensor([0.4, -0.3], requires_grad=True)
    assert [len(clean.ids) for clean in batches.of_step(0)] == [n]

    def step() -> torch.Tensor:
        with steering.frozen_parameters(model):
            gradient, losses = steering.gradient_of_step(model, batches, 0, neurons, a, config)
        return torch.cat((gradient, torch.tensor(list(losses.values()))))

    return step


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_learning_keeps_to_the_budget_as_it_grows(family: str) -> None:
    model = pair(family)[1]

    def peak_of(n: int) -> tuple[int, torch.Tensor]:
        step = step_of(model, n)
        with Allocations() as made:
            out = step()
        return made.peak, out

    needed, (unbounded, expected) = peak_of(2)[0], peak_of(12)
    assert unbounded > 3 * needed, "there is nothing to bound"
    with bounded_by(2.2 * needed / 1e9):
        bounded = [peak_of(n) for n in (4, 12)]
    assert max(size for size, _ in bounded) <= 2.2 * needed
    torch.testing.assert_close(bounded[-1][1], expected, rtol=1e-4, atol=1e-6)


def test_a_step_of_learning_that_runs_out_of_memory_is_taken_again(monkeypatch) -> None:
    step = step_of(pair("qwen")[1], 5)
    expected = step()
    with scarce(
        monkeypatch, steering, "log_probs_from_layer", lambda model, segment, layer: len(segment.resid)
    ) as sizes:
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-6)
    assert sizes[0] == 5 and sizes[-5:] == [1] * 5


def test_attribution_patching_that_runs_out_of_memory_is_run_again(monkeypatch) -> None:
    model = pair()[1]
    facts = hl.counterfactual_pairs("vqa", "color", limit=5)
    pairs = hl.counterfactual(model, facts, load_task("vqa"))
    expected = hl.attribute_patching(model, pairs, "z", by_pair=True, progress=False)
    rankings = gradients.attribution_patching(model, load_task("vqa"), [], pairs=facts, progress=False)
    cls = patching_batches.PairBatch
    with scarce(monkeypatch, cls, "of", lambda model, chosen, *rest: len(chosen)) as sizes:
        found = hl.attribute_patching(model, pairs, "z", by_pair=True, progress=False)
    assert sizes == [5, 2, 1, 1, 1, 1, 1]
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-6)
    with bounded_by(1e-9):
        again = gradients.attribution_patching(model, load_task("vqa"), [], pairs=facts, progress=False)
    torch.testing.assert_close(again, rankings, rtol=1e-4, atol=1e-7)


def test_parts_are_halved_until_they_fit_and_stay_small() -> None:
    allowance, sizes = Allowance(torch.device("cpu"), 1.0), []

    def run(part: Any) -> list[int]:
        sizes.append(len(part))
        if len(part) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return list(part)

    parts = [out for _, out in allowance.in_parts(range(8), lambda rest: 100, run)]
    assert [i for part in parts for i in part] == list(range(8))
    assert sizes == [8, 3, 3, 2]


def test_other_errors_and_single_items_are_not_run_again() -> None:
    allowance, runs = Allowance(torch.device("cpu"), 1.0), []

    def fails(error: Exception) -> Callable[[Any], None]:
        def run(part: Any) -> None:
            runs.append(part)
            raise error

        return run

    for error, items in ((RuntimeError("another one"), [1, 2]), (torch.OutOfMemoryError("full"), [1])):
        with pytest.raises(type(error), match=str(error)):
            next(allowance.in_parts(items, len, fails(error)))
    assert runs == [[1, 2], [1]]


def test_a_budget_holds_inside_its_block_alone() -> None:
    model = pair()[1]
    with bounded_by(2.0):
        assert Budget(model).bytes == Allowance(torch.device("cpu")).bytes == 2e9
        assert Budget(model, 3.0).bytes == 3e9
        with bounded_by(None):
            assert Budget(model).bytes == 2e9
    assert Budget(model).bytes != 2e9
    with pytest.raises(ValueError, match="above 0 GB, not 0"), bounded_by(0):
        pass


@pytest.mark.exhaustive
def test_a_stage_s_own_budget_bounds_its_pictures_too(monkeypatch) -> None:
    model, sizes = pair()[1], []
    true = type(model).encode_images
    monkeypatch.setattr(
        type(model), "encode_images", lambda self, inputs: sizes.append(len(inputs)) or true(self, inputs)
    )
    examples = examples_of("ocr")
    for budget in (None, 1e-9):
        sizes.clear()
        hl.localize_heads(model, "ocr", examples, 2, memory_budget=budget, progress=False)
        assert sizes == ([3] if budget is None else [1, 1, 1])
