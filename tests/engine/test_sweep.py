"""The engine against the naive loop: every arm on every example by `predict` under its hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.hf_task_loops import (
    N_HEADS,
    N_LAYERS,
    TASK_OF_FAMILY,
    examples_of,
    fresh_pair,
    pair,
)
from torch import Tensor

import hones_lens as hl
from hones_lens import HookedVLM, engine
from hones_lens.data.examples import Example
from hones_lens.data.shapes import TASKS
from hones_lens.engine import Sweep, SweepOptions, forks, full_passes, measurement
from hones_lens.engine.memory import Budget
from hones_lens.engine.speculation import Tally
from hones_lens.hones.attribution.head_scores import all_heads
from hones_lens.interventions.hooks import (
    Hook,
    position_wise,
    replace_with_other_heads_mean,
    scale,
    zero_head,
    zero_neurons,
)
from hones_lens.tasks.base import Task
from hones_lens.tasks.registry import load_task

QUIET = SweepOptions(progress=False)
SHIPPED = ("tiny-llava", "tiny-qwen2.5-vl")


@position_wise
def half(x: Tensor, hook: object) -> Tensor:
    return x / 2


@position_wise
def in_place(x: Tensor, hook: object) -> None:
    x.mul_(0.5)


HEADS = [[replace_with_other_heads_mean(layer, h)] for layer in range(N_LAYERS) for h in range(N_HEADS)]
OTHERS = [
    [],
    [zero_head(1, 2)],
    zero_neurons([(1, 4), (0, 3), (2, 7)]),
    [scale("blocks.1.mlp.hook_post", [2, 9], 3.0)],
    [replace_with_other_heads_mean(0, 1), *zero_neurons([(0, 2)])],
    [("blocks.1.attn.hook_z", half), ("blocks.1.hook_attn_out", in_place), ("blocks.1.attn.hook_z", half)],
    [("blocks.0.attn.hook_k", in_place)],
    [("blocks.2.attn.hook_v", half)],
    [("blocks.2.attn.hook_result", half)],
    [("blocks.2.ln1.hook_normalized", half), ("blocks.0.mlp.hook_pre", in_place)],
    [("blocks.1.hook_resid_pre", in_place), ("blocks.2.hook_resid_post", half)],
]
LATE = [
    [replace_with_other_heads_mean(layer, h, positions="last")] for layer in range(N_LAYERS) for h in (0, 2)
]


def third_position(x: Tensor, hook: object) -> Tensor:
    """Of a pass over more than one token; a step of `generate` has one."""
    return x if x.shape[1] < 3 else torch.cat((x[:, :2], 3 * x[:, 2:3], x[:, 3:]), dim=1)


def first_row(x: Tensor, hook: object) -> None:
    x[0] *= 3


# What these edit depends on where a token stands in its pass.
PLACED = [
    *(
        [(f"blocks.{layer}.hook_resid_{at}", third_position)]
        for layer in range(N_LAYERS)
        for at in ("pre", "post")
    ),
    [(f"blocks.{N_LAYERS - 1}.attn.hook_z", third_position)],
    [(f"blocks.{N_LAYERS - 1}.mlp.hook_post", third_position), *zero_neurons([(0, 1)])],
    [("blocks.1.hook_resid_post", first_row)],
    [replace_with_other_heads_mean(0, 1, "last"), replace_with_other_heads_mean(2, 0, "last")],
]
WHOLE = [
    *PLACED,
    [("blocks.1.attn.hook_pattern", half)],
    [("hook_embed", half)],
    [("ln_final.hook_scale", half)],
    [("hook_image_embed", half), *zero_neurons([(1, 1)])],
]


def naive(model: HookedVLM, task: Task, examples: Sequence[Example], hooks: Sequence[Hook]) -> list[float]:
    out = []
    for batch in engine.prompt_batches(model, task, examples, 1):
        (said,) = full_passes.predict(model, task, batch, hooks)
        out.append(task.score(said, batch.examples[0]))
    return out


def flat(lists: list[list]) -> list:
    return [item for items in lists for item in items]


@TASK_OF_FAMILY
def test_answers_and_scores_equal_the_naive_loop(family: str, name: str) -> None:
    _, model = pair(family)
    task, examples, arms = load_task(name), examples_of(name, 3, family), [*HEADS, *OTHERS, *WHOLE, *LATE]
    tally = Tally()
    sweep, found, expected = Sweep(model, arms, SweepOptions(tally=tally)), [], []
    for batch in engine.prompt_batches(model, task, examples, 3):
        found.append(sweep.predictions(task, batch))
        expected.append([full_passes.predict(model, task, batch, hooks) for hooks in arms])
    if task.ranks:
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=5e-5)
    else:
        pairs = zip(flat(found[0]), flat(expected[0]), strict=True)
        assert sum(a != b for a, b in pairs) <= tally.near_ties <= 3  # of some two thousand choices
        assert len(set(flat(expected[0]))) > 9, "the arms do next to nothing"
    scores = [outcome.scores for outcome in engine.measure(model, task, examples, arms, QUIET)]
    said = [[answer for batch in found for answer in batch[i]] for i in range(len(arms))]
    assert scores == [[task.score(a, e) for a, e in zip(s, examples, strict=True)] for s in said]
    rows = sum(len(task.prompts(example)) for example in examples)
    assert tally.full == len(WHOLE) * rows
    assert tally.forked == (len(HEADS) + len(OTHERS) + len(LATE) - 1) * rows


@TASK_OF_FAMILY
def test_log_probs_equal_the_naive_loop(family: str, name: str) -> None:
    _, model = pair(family)
    task, examples, arms = load_task(name), examples_of(name, 3, family), [*HEADS, *OTHERS, *WHOLE]
    found = engine.measure_log_probs(model, task, examples, arms, QUIET)
    for hooks, values in zip(arms, found, strict=True):
        at_once = 3 if hooks in PLACED else 1
        expected = [
            float(value)
            for batch in engine.answer_batches(model, task, examples, at_once)
            for value in full_passes.log_probs(model, batch, hooks)
        ]
        assert values == pytest.approx(expected, abs=5e-5, rel=1e-5)


def test_the_metric_so_far_is_that_of_all_examples_however_they_came() -> None:
    task, rng, outcome = load_task("caption"), np.random.default_rng(0), measurement.Outcome()
    for added in (1, 0, 3, 2):
        outcome.statistics += list(rng.integers(1, 9, (added, 10)).astype(float))
        assert outcome.metric_so_far(task) == outcome.metric(task)
        assert outcome.metric_so_far(task) == outcome.metric(task)  # and asked twice


def test_heads_and_neurons_need_no_full_pass() -> None:
    _, model = pair()
    tally = Tally()
    arms = [*HEADS, zero_neurons([(0, 1)]), [scale("blocks.2.mlp.hook_post", [3], 2.0)]]
    engine.measure(model, load_task("vqa"), examples_of("vqa"), arms, replace(QUIET, tally=tally))
    assert tally.full == 0 and ": 0% by a full pass" in str(tally)


def test_lasting_hooks_are_kept() -> None:
    """A fork would pass them by: with them, all rows are run whole."""
    _, model = fresh_pair()
    task, examples, arms = load_task("ocr"), examples_of("ocr"), [[], HEADS[3], OTHERS[2]]
    plain = [naive(model, task, examples, hooks) for hooks in arms]
    model.add_hook("blocks.1.mlp.hook_post", half)
    tally = Tally()
    found = [o.scores for o in engine.measure(model, task, examples, arms, replace(QUIET, tally=tally))]
    assert found == [naive(model, task, examples, hooks) for hooks in arms] != plain
    assert tally.forked == 0 and tally.full == 9


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["ocr", "retrieval"])
def test_how_rows_are_put_together_does_not_matter(name: str) -> None:
    _, model = pair("qwen")
    task, examples = load_task(name), examples_of(name, 3, "qwen")
    arms = [*HEADS[:6], *OTHERS[:4]]
    found = []
    for gigabytes, batch_size in ((None, 32), (1e-9, 2), (1e-2, 1)):
        options = {"memory_budget": gigabytes, "batch_size": batch_size, "progress": False}
        found.append([o.scores for o in engine.measure(model, task, examples, arms, SweepOptions(**options))])
    assert found[0] == found[1] == found[2]


@pytest.mark.exhaustive
def test_a_pass_that_runs_out_of_memory_is_run_again_with_half_the_rows(monkeypatch) -> None:
    _, model = pair()
    task, examples = load_task("ocr"), examples_of("ocr")
    expected = [o.scores for o in engine.measure(model, task, examples, HEADS, QUIET)]
    sizes = []
    fork = forks.fork

    def scarce(model, segments, steps, arms, whole=False):
        sizes.append(len(arms))
        if len(arms) > 1:
            raise torch.OutOfMemoryError("not enough memory: you tried to allocate 1 byte")
        return fork(model, segments, steps, arms, whole)

    monkeypatch.setattr(forks, "fork", scarce)
    assert [o.scores for o in engine.measure(model, task, examples, HEADS, QUIET)] == expected
    assert max(sizes) > 1 and sizes[-1] == 1

    def none_at_all(*args, **options):
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(forks, "fork", none_at_all)
    with pytest.raises(torch.OutOfMemoryError):
        engine.measure(model, task, examples, HEADS[:1], QUIET)


def test_the_budget() -> None:
    _, model = pair()
    assert Budget(model, 1e-9).rows(100) == 1
    wide = Budget(model, 1e3)
    assert wide.rows(100) == 15 and wide.rows(10**6) == 1  # bounded on a CPU
    with pytest.raises(ValueError, match="above 0 GB, not 0"):
        Budget(model, 0)


@pytest.mark.parametrize("name", ["ocr", "retrieval"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_stop_the_sweep(name: str, value: float) -> None:
    _, model = pair()
    examples = list(examples_of(name))

    def spoil(x: Tensor, hook: object) -> Tensor:
        return x.index_fill(0, torch.tensor([0]), value)

    arms = [HEADS[0], [("blocks.1.hook_mlp_out", spoil)]]
    with pytest.raises(FloatingPointError, match=rf"blocks\.1\.hook_mlp_out.*{examples[0].id}"):
        engine.measure(model, load_task(name), examples[:1], arms, QUIET)
    with pytest.raises(FloatingPointError, match=rf"blocks\.1\.hook_mlp_out.*{examples[0].id}"):
        engine.measure_log_probs(model, load_task(name), examples[:1], arms, QUIET)


def test_a_head_that_makes_nan_is_named() -> None:
    _, model = fresh_pair()
    with torch.no_grad():
        model.blocks[2].attn.W_O[1] *= 1e38
        model.blocks[2].attn.W_O[2] *= -1e38
    with pytest.raises(FloatingPointError, match=r"head \d at blocks|no hook"):
        engine.measure(model, load_task("vqa"), examples_of("vqa"), HEADS, QUIET)


def test_near_ties_are_counted() -> None:
    _, model = fresh_pair()
    with torch.no_grad():
        model.unembed.linear.weight.copy_(
            model.unembed.linear.weight[:1].expand_as(model.unembed.linear.weight)
        )
    tally = Tally()
    engine.measure(model, load_task("vqa"), examples_of("vqa"), HEADS[:1], replace(QUIET, tally=tally))
    assert tally.near_ties > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("task", TASKS)
def test_shipped_models_every_fifth_head(name: str, task: str) -> None:
    examples = hl.load_examples("shapes", task, "discovery", 4)
    if task == "retrieval":
        examples = [with_candidates(example, 12) for example in examples]
    assert_equal_drops(name, task, examples, slice(None, None, 5))


@pytest.mark.by_hand
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("task", TASKS)
def test_shipped_models_every_head(name: str, task: str) -> None:
    assert_equal_drops(name, task, hl.load_examples("shapes", task, "discovery", 32), slice(None))


def with_candidates(example: Example, n: int) -> Example:
    """The first n candidates and the right one."""
    kept = sorted({*range(n), example.positive})
    candidates = tuple(example.candidates[i] for i in kept)
    return replace(example, candidates=candidates, positive=kept.index(example.positive))


def assert_equal_drops(name: str, task_name: str, examples: Sequence[Example], which: slice) -> None:
    """Per-example drops of heads, by the engine and by one `generate` (or ranking) a head and example."""
    model, task = HookedVLM.from_pretrained(name), load_task(task_name)
    cells, n = all_heads(model)[which], len(examples)
    found = hl.localize_heads(model, task, examples, progress=False)
    clean = naive(model, task, examples, [])
    assert found.base_scores.tolist() == clean
    batches = list(engine.prompt_batches(model, task, examples, n))
    differing = 0
    for layer, head in cells:
        hook = replace_with_other_heads_mean(layer, head)
        said = [p for batch in batches for p in full_passes.predict(model, task, batch, [hook])]
        scores = [task.score(p, example) for p, example in zip(said, examples, strict=True)]
        expected = [a - b for a, b in zip(clean, scores, strict=True)]
        differing += sum(a != b for a, b in zip(found.drops[layer, head].tolist(), expected, strict=True))
    assert differing == 0, f"{differing} of {len(cells) * n} cells differ"


def test_inputs_without_padding_and_before_answers() -> None:
    _, model = pair("qwen")
    examples = examples_of("ocr", 3, "qwen")
    images = [example.image for example in examples]
    prompts, answers = (
        ["a", "how many shapes are there?", "what color?"],
        ["one two", "three", "four two one"],
    )
    together = model.prepare(images, prompts, answers).before_answers()
    alone = model.prepare(images, prompts)
    for name in ("input_ids", "attention_mask", "position_ids", "image_mask", "question_mask"):
        mine, theirs = getattr(together, name), getattr(alone, name)
        tokens = alone.attention_mask.bool()
        assert torch.equal(mine[..., tokens], theirs[..., tokens])
    assert together.answer_mask is None
    one = alone[0]
    assert one.without_padding().input_ids.shape[1] == int(one.attention_mask.sum()) < one.input_ids.shape[1]
    assert torch.allclose(model(one.without_padding())[0, -1], model(one)[0, -1], atol=5e-5)


def test_candidates_without_a_common_image_share_nothing() -> None:
    _, model = pair()
    example = examples_of("retrieval")[0]
    inputs = model.prepare([None, None], ["a circle", "a square"])
    segments, rows = engine.split_shared_prefix(model, inputs)
    assert len(segments) == 2 and segments[0].keep == 0 and rows[1] == [0, 1]
    inputs = model.prepare([example.image] * 2, ["a circle", "a circle and a square"])
    ids = inputs.input_ids.clone()
    first = int(inputs.attention_mask[0].int().argmax())
    ids[0, first] = 5 if int(ids[0, first]) != 5 else 6  # the rows differ before the image
    segments, rows = engine.split_shared_prefix(model, replace(inputs, input_ids=ids))
    assert [s.keep for s in segments] == [1, 1] and not any(s.prefixed for s in segments)
    assert rows == [[0], [1]]


@pytest.mark.parametrize("name", ["ocr", "retrieval"])
def test_the_bar_counts_every_cell(name: str, monkeypatch) -> None:
    _, model = pair()
    bars = []
    make = measurement._bar
    monkeypatch.setattr(measurement, "_bar", lambda *args: bars.append(make(*args[:-1], True)) or bars[-1])
    arms, examples, journal = [[], HEADS[0], HEADS[5], WHOLE[0]], examples_of(name), {}
    for _ in range(2):
        options = SweepOptions(batch_size=2, journal=journal)
        engine.measure(model, load_task(name), examples, arms, options)
        engine.measure_log_probs(model, load_task(name), examples, arms, SweepOptions(batch_size=2))
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [12] * 4
    assert len(journal) == 2
