"""Prompts with their right answers, which steering learns from and is measured on; splits of examples."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepOptions
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM
from hones_lens.tasks import Task

NEGATIVES = 3
Arms = Sequence[Sequence[Hook]]


class LabelledPrompt(NamedTuple):
    """A prompt with its right answer; `weight` is its share in its example's loss."""

    example: Example
    prompt: str
    answer: str
    weight: float


def labelled_prompts(
    task: Task, examples: Sequence[Example], negatives: int, seed: int
) -> list[list[LabelledPrompt]]:
    """The labelled prompts of each example.

    A text task asks for its answer. A ranking task (ours) asks about the positive, where Yes is right, and
    about some of the wrong candidates, where No is right. Both sides weigh one half: a model steered
    towards Yes alone would learn to say Yes to everything.

    Args:
        task, examples: What to ask.
        negatives: How many wrong candidates of an example, drawn from all it has (fewer if it has fewer).
        seed: Of the draw, which depends on the example's id and not on the other examples.

    Raises:
        ValueError: An example of a ranking task without a wrong candidate.
    """
    if not task.ranks:
        return [[LabelledPrompt(e, task.target_prompt(e), task.answer(e), 1.0)] for e in examples]
    return [_yes_no_prompts(task, example, negatives, seed) for example in examples]


def _yes_no_prompts(task: Task, example: Example, negatives: int, seed: int) -> list[LabelledPrompt]:
    true_prompt = task.target_prompt(example)
    wrong_prompts = [prompt for prompt in task.prompts(example) if prompt != true_prompt]
    if not wrong_prompts:
        raise ValueError(f"example {example.id!r} has no wrong candidate to say No to")
    rng = np.random.default_rng([seed, zlib.crc32(example.id.encode())])
    drawn = rng.choice(len(wrong_prompts), size=min(negatives, len(wrong_prompts)), replace=False).tolist()
    negative_prompts = [
        LabelledPrompt(example, wrong_prompts[i], "No", 0.5 / len(drawn)) for i in sorted(drawn)
    ]
    return [LabelledPrompt(example, true_prompt, task.answer(example), 0.5), *negative_prompts]


def prepare_batch(model: HookedVLM, labelled: Sequence[LabelledPrompt]) -> engine.Batch:
    """Prepare prompts followed by their answers, with the images encoded."""
    images, texts = [prompt.example.image for prompt in labelled], [prompt.prompt for prompt in labelled]
    inputs = model.prepare(images, texts, [prompt.answer for prompt in labelled])
    return engine.Batch([q.example for q in labelled], model.with_image_embeds(inputs), [1] * len(labelled))


def answer_log_probs(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    arms: Arms,
    options: SweepOptions,
    *,
    negatives: int = NEGATIVES,
    seed: int = 0,
    label: str = "log-probabilities",
) -> np.ndarray:
    """Log-probability of the right answers under each arm's hooks, in nats, [arm example].

    Of a ranking task it is the weighted mean over its `labelled_prompts`, Yes and No alike.
    """
    if not task.ranks:
        return np.array(engine.measure_log_probs(model, task, examples, arms, options, label=label))
    journal = options.journal
    log_probs = np.zeros((len(arms), len(examples)))
    size = log_prob_examples(task, options.batch_size, negatives)
    total, desc = len(examples) * len(arms), f"{label} · {task.name}"
    with tqdm(total=total, desc=desc, disable=not options.progress, unit="cell") as bar:
        runner = engine.Sweep(model, arms, options)
        for number, start in enumerate(range(0, len(examples), size)):
            batch_examples = examples[start : start + size]
            key = f"{label}/{number}"
            values = None if journal is None else journal.get(key)
            if values is None:
                values = _weighted_log_probs(
                    runner, model, labelled_prompts(task, batch_examples, negatives, seed)
                )
                if journal is not None:
                    journal[key] = values
            log_probs[:, start : start + size] = values
            bar.update(len(batch_examples) * len(arms))
    return log_probs


def log_prob_examples(task: Task, batch_size: int, negatives: int) -> int:
    """How many examples `answer_log_probs` runs at a time."""
    return max(1, batch_size // (1 + negatives)) if task.ranks else batch_size


def _weighted_log_probs(
    runner: engine.Sweep, model: HookedVLM, by_example: list[list[LabelledPrompt]]
) -> list[list[float]]:
    prompts = [prompt for example_prompts in by_example for prompt in example_prompts]
    values = np.array(runner.log_probs(prepare_batch(model, prompts))) * [prompt.weight for prompt in prompts]
    starts = np.cumsum([0, *map(len, by_example)])[:-1]
    return np.add.reduceat(values, starts, axis=1).tolist()


def image_key(example: Example) -> str:
    """A key of an example's image, which is equal for all examples on the same picture.

    It is the data set's own name for the picture, `facts["image_id"]`, where one is given (the boxes that
    are drawn on it would make another picture of it each), else a hash of the pixels.
    """
    if "image_id" in example.facts:
        return str(example.facts["image_id"])
    image = example.image
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=12).hexdigest()


def split_by_image(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cut examples in two that share no picture; both keep the order of the examples.

    Args:
        examples: What to cut.
        share: About how much of them the first part has.
        seed: Which.

    Raises:
        ValueError: A share that is not between 0 and 1, or fewer than two pictures.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to learn on must lie between 0 and 1, not {share}")
    image_keys = [image_key(example) for example in examples]
    unique_images = sorted(set(image_keys))
    if len(unique_images) < 2:
        raise ValueError(f"{len(examples)} examples on {len(unique_images)} picture can't be cut in two")
    order = np.random.default_rng(seed).permutation(len(unique_images))
    n = min(len(unique_images) - 1, max(1, round(share * len(unique_images))))
    first_keys = {unique_images[i] for i in order[:n]}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example, key in zip(examples, image_keys, strict=True):
        parts[key not in first_keys].append(example)
    return parts


def check_disjoint_images(named: dict[str, Sequence[Example]]) -> None:
    """Raise if two sets of examples show the same picture.

    Raises:
        ValueError: They do; names an example of each.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, examples in named.items():
        for picture, example in _pictures(examples):
            other, where = seen.setdefault(picture, (example.id, name))
            if where != name:
                raise ValueError(
                    f"{name} example {example.id!r} shows the picture of {where} example {other!r}"
                )


def _pictures(examples: Sequence[Example]) -> Iterable[tuple[str, Example]]:
    return ((image_key(example), example) for example in examples)
