"""Training batches from the shapes world: several questions and answers packed behind one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hones_lens.data import (
    ATTRIBUTES,
    IMAGE_SIZE,
    Example,
    Scene,
    SeededRandom,
    counterfactual_scenes,
    questions,
    random_image_size,
    random_question,
    random_scene,
)
from hones_lens.model import AttentionContext, HookedVLM, ImageText, VLMInputs
from hones_lens.tasks import load_task

_VQA_PAIRS = 4
# Probability that a false caption changes the attribute that its phase of training emphasizes.
_EMPHASIS_SHARE = 0.6


@dataclass
class PackedBatch:
    """One training step. All segments of a row see its image prefix and nothing of each other.

    Attributes:
        inputs: Tokens and images, padded on the right.
        shift: What to take from a token's position in the row, [batch pos]: positions restart after
            the prefix in every segment.
        mask: bool [batch 1 pos pos], True where query may see key.
        rows, cols: where the next token is an answer token, [n_answers] each.
        targets, weights: that next token, and its weight in the loss, [n_answers] each.
        kinds: what was asked there (a kind of VQA question, or a task), [n_answers].
    """

    inputs: VLMInputs
    shift: Tensor
    mask: Tensor
    rows: Tensor
    cols: Tensor
    targets: Tensor
    weights: Tensor
    kinds: list[str]


class Turn(NamedTuple):
    """One question and its answer."""

    kind: str
    prompt: str
    answer: str


def conversation(
    scene: Scene,
    rng: SeededRandom,
    naming: bool = True,
    ocr_share: float = 0.5,
    emphasis: str | None = "column",
) -> list[Turn]:
    """Turns on one scene: four VQA pairs, often a word and a caption, and four captions to judge.

    Args:
        scene: What is shown.
        rng: Draws them.
        naming: Not the first part of training: names are among the VQA pairs, and the captions to judge
            are all of the whole scene.
        ocr_share: How probable it is that the word is asked for.
        emphasis: What most false captions change: a thing's "column" in its row, or its "shape" (then
            the shape question is asked wherever there is one). None: each attribute equally often.
    """
    vqa, ocr, caption, retrieval = map(load_task, ("vqa", "ocr", "caption", "retrieval"))
    kinds = sorted({q.kind for q in questions(scene)} - ({"name"} if not naming else set()))
    turns = []
    asked_first = [k for k in kinds if k == emphasis]
    drawn = rng.shuffled([k for k in kinds if k != emphasis])
    for kind in (asked_first + drawn)[:_VQA_PAIRS]:
        question = random_question(rng, scene, kind)
        prompt = vqa.prompts(Example("", scene, question=question.text))[0]
        turns.append(Turn(kind, prompt, question.answer))
    if rng.bernoulli(ocr_share):
        turns.append(Turn("ocr", ocr.prompts(Example("", scene))[0], scene.word))
    if rng.bernoulli(0.5):
        turns.append(Turn("caption", caption.prompts(Example("", scene))[0], scene.captions[0]))
    for candidate, true in _candidates(scene, rng, naming, emphasis):
        prompt = retrieval.prompts(Example("", scene, candidates=(candidate,)))[0]
        turns.append(Turn("retrieval", prompt, "Yes" if true else "No"))
    return turns


def _candidates(
    scene: Scene, rng: SeededRandom, naming: bool, emphasis: str | None
) -> list[tuple[str, bool]]:
    """Four captions and whether they are true; in the first part two are of one thing alone (easier)."""
    parts = [replace(scene, things=(rng.choice(scene.things),)) for _ in range(0 if naming else 2)]
    scenes = [*parts, *[scene] * (4 - len(parts))]
    captions = []
    for shown in scenes:
        false = None if rng.bernoulli(0.5) else _false_caption(scene, shown, rng, emphasis)
        captions.append((shown.captions[0] if false is None else false, false is None))
    return captions


def _false_caption(scene: Scene, part: Scene, rng: SeededRandom, emphasis: str | None) -> str:
    """The caption of `part` with one attribute changed (mostly the emphasized one), sometimes two."""
    while True:
        if emphasis is not None and rng.bernoulli(_EMPHASIS_SHARE):
            other = rng.choice(_emphasized_changes(part, emphasis))
        else:
            other = rng.choice(counterfactual_scenes(part, (rng.choice(ATTRIBUTES),)))
        if rng.bernoulli(0.2):
            other = rng.choice(counterfactual_scenes(other))
        if other.captions[0] not in (*scene.captions, *(t.phrase for t in scene.things)):
            return other.captions[0]


def _emphasized_changes(scene: Scene, emphasis: str) -> list[Scene]:
    """The scenes with one thing of another shape, or one thing in another column of its row."""
    if emphasis != "column":
        return counterfactual_scenes(scene, (emphasis,))
    rows = [thing.row for thing in scene.things]
    return [s for s in counterfactual_scenes(scene, ("where",)) if [thing.row for thing in s.things] == rows]


def training_scenes(
    seed: int,
    step: int,
    count: int,
    split: str = "train",
    sides: Sequence[int] = IMAGE_SIZE[:1],
) -> list[tuple[Scene, SeededRandom]]:
    """The scenes of one step, a function of (seed, step) alone so that a resumed run repeats it.

    Args:
        seed, step, count, split: Which scenes, and how many.
        sides: Widths and heights to draw from; half the steps show the first alone. All pictures of
            one step have one size.
    """
    size = IMAGE_SIZE
    sizes = SeededRandom("train-tiny", seed, step, "size")
    if len(sides) > 1 and sizes.bernoulli(0.5):
        size = random_image_size(sizes, sides)
    generators = [SeededRandom("train-tiny", seed, step, i) for i in range(count)]
    return [(random_scene(rng, split, size), rng) for rng in generators]


def pack(
    model: HookedVLM,
    scenes: list[tuple[Scene, SeededRandom]],
    naming: bool = True,
    ocr_share: float = 0.5,
    emphasis: str | None = "column",
) -> PackedBatch:
    """Tokenize one step's scenes and pack each one's turns (see `conversation`) behind its image."""
    pixels, counts = model.process_images([scene.load() for scene, _ in scenes])
    conversations = [conversation(scene, rng, naming, ocr_share, emphasis) for scene, rng in scenes]
    rows = [_tokenize(model, turns, count) for turns, count in zip(conversations, counts, strict=True)]
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), model.cfg.pad_token_id)
    shift, segments = torch.zeros_like(ids), torch.full_like(ids, -1)
    answers = []
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        shift[i, :n] = torch.tensor(row.shift)
        segments[i, :n] = torch.tensor(row.segments)
        answers += [(i, col, row.ids[col + 1], weight, kind) for col, weight, kind in row.answers]
    q, k = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((k == 0) | (k == q)) & (k >= 0) | torch.eye(length, dtype=torch.bool)
    row_indices, columns, targets, weights, kinds = zip(*answers, strict=True)
    return PackedBatch(
        inputs=model.as_inputs(VLMInputs(ids, (segments >= 0).long(), **pixels)),
        shift=shift,
        mask=mask[:, None],
        rows=torch.tensor(row_indices),
        cols=torch.tensor(columns),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
        kinds=list(kinds),
    )


def answer_logits(model: HookedVLM, batch: PackedBatch) -> Float[Tensor, "n_answers d_vocab"]:
    """Logits where the next token is an answer token."""
    positions = model.positions(batch.inputs) - batch.shift
    cos, sin = model.rotary(positions, model.cfg.dtype)
    resid, read = model.enter(batch.inputs)
    context = AttentionContext(cos, sin, batch.mask, causal=True, deepstack=read.deepstack)
    resid = model.run_blocks(resid, context)
    return model.unembed(model.ln_final(resid[batch.rows, batch.cols]))


@dataclass
class _Row:
    ids: list[int]
    shift: list[int]
    segments: list[int]  # 0 for the image prefix, then 1, 2, … by question
    answers: list[tuple[int, float, str]]  # column whose next token is an answer token; weight; kind


def _tokenize(model: HookedVLM, turns: list[Turn], image_tokens: ImageText) -> _Row:
    tokenizer = model.tokenizer
    row = _Row([], [], [], [])
    for segment, (kind, prompt, answer) in enumerate(turns, start=1):
        prompt_text = model.render(prompt, [image_tokens])
        answer_text = f"{prompt_text}{model.answer_separator}{answer}{tokenizer.eos_token}"
        opening, full = (model.to_tokens(text)[0].tolist() for text in (prompt_text, answer_text))
        start = len(opening) - opening[::-1].index(model.cfg.image_token_id)
        if segment == 1:
            row.ids += full[:start]
            row.shift += [0] * start
            row.segments += [0] * start
        offset = len(row.ids) - start
        row.ids += full[start:]
        row.shift += [offset] * (len(full) - start)
        row.segments += [segment] * (len(full) - start)
        n_answer_tokens = len(full) - len(opening)
        row.answers += [
            (offset + len(opening) - 1 + j, n_answer_tokens**-0.5, kind) for j in range(n_answer_tokens)
        ]
    return row
