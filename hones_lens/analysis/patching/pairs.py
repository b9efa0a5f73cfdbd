"""Pairs of clean and corrupted inputs, with the two tokens that distinguish their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hones_lens.data import CounterfactualPair
from hones_lens.engine import as_task
from hones_lens.interventions import Corruption, Group, token_mask
from hones_lens.model import (
    Answer,
    HookedVLM,
    VLMInputs,
    leading_blanks,
    pad_left,
    takes_iterables,
    token_names,
)
from hones_lens.tasks import Task

Answers = Int[Tensor, " batch"] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class PatchPairs:
    """A batch of clean prompts and the same batch corrupted, token for token in the same places.

    Attributes:
        clean, corrupted: Prepared; of one shape, padded alike, image tokens and masks in the same places.
            Where the answers begin alike, what they share is at the end of both; without a foil, the white
            space that the answer begins with.
        answer: The token that comes next on the clean input, [batch]: the first that tells the answer from
            its foil, or without a foil from an empty answer.
        foil: The one that comes next on the corrupted input, [batch]; None where there is no other answer.
        ids: Names of the pairs, for error messages and results.
        facts: The counterfactual pairs that they were made from, if they were.
        task: Whose prompts those were given: its name, or the task itself.
        shared: How many tokens of the answers are at the end of each, [batch]; () for none.
        answer_ids, foil_ids: The whole answers, as they follow the prompts, with the tokens that are at the
            end of these already; () where `answer` and `foil` are all that is known.
    """

    clean: VLMInputs
    corrupted: VLMInputs
    answer: Int[Tensor, " batch"]
    foil: Int[Tensor, " batch"] | None
    ids: tuple[str, ...]
    facts: tuple[CounterfactualPair, ...] = ()
    task: str | Task = ""
    shared: tuple[int, ...] = ()
    answer_ids: tuple[tuple[int, ...], ...] = ()
    foil_ids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        clean, corrupted = self.clean, self.corrupted
        for field_name in ("answer", "foil", "ids"):
            value = getattr(self, field_name)
            if value is not None and len(value) != len(clean):
                raise ValueError(f"{len(value)} entries of {field_name} for {len(clean)} pairs")
        if clean.input_ids.shape != corrupted.input_ids.shape:
            raise ValueError(
                f"clean inputs of the shape {tuple(clean.input_ids.shape)} and corrupted ones of "
                f"{tuple(corrupted.input_ids.shape)}: a pair needs tokens in the same places"
            )
        clean.require_left_padding("patch")
        corrupted.require_left_padding("patch")
        same = clean.attention_mask.eq(corrupted.attention_mask) & clean.image_mask.eq(corrupted.image_mask)
        for row, alike in enumerate(same.all(-1).tolist()):
            if not alike or clean.grids[row : row + 1] != corrupted.grids[row : row + 1]:
                raise ValueError(f"pair {self.ids[row]!r}: padding or image tokens lie in different places")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Sequence[int]) -> PatchPairs:
        """The selected pairs, without padding that none of them needs."""
        index = torch.arange(len(self))[rows]
        numbers = index.tolist()
        listed = {
            name: tuple(values[i] for i in numbers) if (values := getattr(self, name)) else ()
            for name in ("ids", "facts", "shared", "answer_ids", "foil_ids")
        }
        clean, corrupted = self.clean[index].without_padding(), self.corrupted[index].without_padding()
        index = index.to(self.answer.device)
        foil = None if self.foil is None else self.foil[index]
        return replace(self, clean=clean, corrupted=corrupted, answer=self.answer[index], foil=foil, **listed)

    def swapped(self) -> PatchPairs:
        """The pairs with clean and corrupted exchanged.

        Raises:
            ValueError: There is no other answer.
        """
        if self.foil is None:
            raise ValueError("pairs without a foil can't be swapped: the corrupted input has no answer")
        facts = tuple(
            replace(fact, clean=fact.corrupted, corrupted=fact.clean, answers=fact.answers[::-1])
            for fact in self.facts
        )
        sides: dict[str, Any] = {"clean": self.corrupted, "corrupted": self.clean}
        sides |= {"answer_ids": self.foil_ids, "foil_ids": self.answer_ids}
        return replace(self, **sides, answer=self.foil, foil=self.answer, facts=facts)

    def without_answer_prefix(self) -> PatchPairs:
        """The same pairs without the shared beginnings of their answers, for a model to generate them."""
        if not any(self.shared):
            return self
        counts = torch.tensor(self.shared, device=self.answer.device)
        sides = (inputs.without_last(counts).without_padding() for inputs in (self.clean, self.corrupted))
        return replace(self, **dict(zip(("clean", "corrupted"), sides, strict=True)), shared=())

    def mask(self, group: Group) -> Tensor:
        """Positions of a token group, [batch pos]."""
        return token_mask(self.clean, group)


@takes_iterables
def counterfactual(model: HookedVLM, pairs: Sequence[CounterfactualPair], task: str | Task) -> PatchPairs:
    """Inputs of counterfactual pairs: one prompt on two pictures that differ in one fact.

    Args:
        model: The model.
        pairs: E.g. of `hones_lens.counterfactual_pairs`.
        task: Whose prompt they are given; a task or its name.

    Raises:
        ValueError: No pairs, or answers of a pair that can't be told apart by one token.
    """
    if not pairs:
        raise ValueError("no pairs")
    known_task = as_task(task)
    prompts = [known_task.target_prompt(pair.clean) for pair in pairs]
    ids = tuple(pair.clean.id for pair in pairs)
    clean = model.prepare([pair.clean.image for pair in pairs], prompts)
    corrupted = model.prepare([pair.corrupted.image for pair in pairs], prompts)
    answers = [
        [model.continuation(p, a) for a in pair.answers] for p, pair in zip(prompts, pairs, strict=True)
    ]
    batch = with_shared_prefix(model, clean, corrupted, answers, ids)
    return replace(batch, facts=tuple(pairs), task=task)


@takes_iterables
def corrupted_by(
    model: HookedVLM,
    inputs: VLMInputs,
    corruption: Corruption,
    answers: Answers,
    foils: Answers | None = None,
    ids: Sequence[str] = (),
) -> PatchPairs:
    """Pairs of inputs and their corrupted versions.

    Args:
        model, inputs: The clean batch, from `model.prepare`.
        corruption: Takes the model and VLMInputs, and returns VLMInputs of the same shape (see
            `hones_lens.interventions.corruptions`).
        answers: What is right on the clean inputs, one a row: the ids of the whole answer, as
            `model.continuation` gives them, or the one token that comes next.
        foils: Another answer, one a row, given in the same way.
        ids: Names of the rows; default: their numbers.

    Raises:
        ValueError: The corruption moved tokens, or changed nothing in a row; another number of answers than
            of rows; an answer and a foil that are the same.
    """
    clean = model.as_inputs(inputs)
    corrupted = model.as_inputs(corruption(model, clean))
    device = clean.input_ids.device
    names = tuple(ids) or tuple(f"row {row}" for row in range(len(clean)))
    if _are_whole(answers):
        sides = (answers,) if foils is None else (answers, foils)
        pairs = with_shared_prefix(model, clean, corrupted, list(zip(*sides, strict=True)), names)
    else:
        foil = None if foils is None else torch.as_tensor(foils, device=device)
        pairs = PatchPairs(clean, corrupted, torch.as_tensor(answers, device=device), foil, names)
    encoded = corrupted.image_embeds is not None
    before = model.with_image_embeds(clean) if encoded else clean
    for row, name in enumerate(names):
        a, b = before[row], corrupted[row]
        was, now = (i.image_embeds if encoded else i.pixel_values for i in (a, b))
        alike = was is None or now is None or torch.equal(was, now)
        if alike and torch.equal(a.input_ids, b.input_ids):
            raise ValueError(f"{corruption} changes nothing in {name!r}")
    return pairs


def _are_whole(answers: Answers) -> bool:
    """Whether each answer is given by all of its ids, rather than by the token that comes next."""
    return not isinstance(answers, Tensor) and any(isinstance(answer, Sequence) for answer in answers)


def with_shared_prefix(
    model: HookedVLM,
    clean: VLMInputs,
    corrupted: VLMInputs,
    answers: Sequence[Sequence[list[int]]],
    ids: tuple[str, ...],
) -> PatchPairs:
    """Pairs in which what comes before the token that tells an answer apart is appended to the prompts.

    That is the tokens that answer and foil both begin with; without a foil, the white space that an answer
    begins with.

    Args:
        model: The model.
        clean, corrupted: The prompts.
        answers: Of each pair the ids of the right answers to the clean and to the corrupted prompt, as they
            follow it (`model.continuation`); or of the clean one alone.
        ids: Names of the pairs.

    Raises:
        ValueError: Both answers of a pair are the same tokens, or another number of answers than of pairs.
    """
    if len(answers) != len(ids):
        raise ValueError(f"{len(answers)} entries of answer for {len(ids)} pairs")
    eos, counts, sides = model.cfg.eos_token_ids[:1], list[int](), list[list[tuple[int, ...]]]()
    for given, name in zip(answers, ids, strict=True):
        if len(given) == 1:
            n, ended = leading_blanks(model, given[0]), [tuple(given[0])]
        else:
            ended = [(*answer_ids, *eos) for answer_ids in given]
            n = next((i for i, (x, y) in enumerate(zip(*ended, strict=False)) if x != y), None)
        if n is None:
            raise ValueError(f"pair {name!r}: no token tells its two answers apart")
        counts.append(n)
        whole = zip(ended, given, strict=True)
        sides.append([answer_ids[: max(n + 1, len(alone))] for answer_ids, alone in whole])
    device = clean.input_ids.device
    shared = [list(side[0][:n]) for side, n in zip(sides, counts, strict=True)]
    if any(shared):
        clean, corrupted = (_append_tokens(model, inputs, shared) for inputs in (clean, corrupted))
    by_side = list(zip(*sides, strict=True))
    ends = [
        torch.tensor([x[n] for x, n in zip(side, counts, strict=True)], device=device) for side in by_side
    ]
    answer, foil = ends if len(ends) == 2 else (ends[0], None)
    wholes = dict(zip(("answer_ids", "foil_ids"), by_side, strict=False))
    return PatchPairs(
        clean, corrupted, answer, foil, ids, shared=tuple(counts) if any(counts) else (), **wholes
    )


def with_answers(model: HookedVLM, pairs: PatchPairs) -> tuple[VLMInputs, VLMInputs, Answer, list[int]]:
    """Both inputs followed by the right answers, so that the last positions predict all of their tokens.

    Returns:
        Clean and corrupted inputs, the answers' tokens at the last positions, and the number of tokens that
        were appended to each row.
    """
    shared = pairs.shared or (0,) * len(pairs)
    suffixes = [list(ids[n:-1]) for ids, n in zip(pairs.answer_ids, shared, strict=True)]
    clean, corrupted = (
        _append_tokens(model, inputs, suffixes) if any(suffixes) else inputs
        for inputs in (pairs.clean, pairs.corrupted)
    )
    device, width = clean.input_ids.device, clean.input_ids.shape[1]
    ids = pad_left(pairs.answer_ids, 0).to(device)
    mask = pad_left([[True] * len(answer_ids) for answer_ids in pairs.answer_ids], False).to(device)
    positions = torch.arange(width - ids.shape[1], width, device=device)
    return clean, corrupted, Answer(positions, ids, mask), [len(suffix) for suffix in suffixes]


def continued_mask(mask: Bool[Tensor, "batch pos"], counts: Sequence[int]) -> Bool[Tensor, "batch longer"]:
    """A mask over prompts, continued over the tokens that were appended to each and padded on the left.

    A new token is in the mask where its row's last token is, as under `generate`.
    """
    longest = max(counts)
    wide = torch.cat((mask, mask[:, -1:].expand(-1, longest)), dim=1)
    missing = longest - torch.tensor(counts, device=mask.device)[:, None]
    columns = torch.arange(wide.shape[1], device=mask.device)
    return wide.gather(1, (columns - missing) % wide.shape[1]) & (columns >= missing)


def measured_tokens(model: HookedVLM, pairs: PatchPairs, whole: bool) -> list[str]:
    """Of each pair the tokens that are measured: of the whole answer, or the one that tells it apart."""
    shared, names = pairs.shared or (0,) * len(pairs), list[str]()
    for row in range(len(pairs)):
        if whole and pairs.answer_ids:
            names.append(" ".join(token_names(model, pairs.answer_ids[row])))
            continue
        ends = [int(x[row]) for x in (pairs.answer, pairs.foil) if x is not None]
        name = " against ".join(token_names(model, ends))
        if shared[row] and pairs.answer_ids:
            before = " ".join(token_names(model, pairs.answer_ids[row][: shared[row]]))
            name = f"{name} behind {before}"
        names.append(name)
    return names


def measured_note(names: Sequence[str]) -> str:
    """The tokens that are measured, up to three different ones, as a line of text."""
    different = list(dict.fromkeys(names))
    more = f", and {len(different) - 3} more" if len(different) > 3 else ""
    return f"tokens of the answers: {', '.join(different[:3])}{more}"


def _append_tokens(model: HookedVLM, inputs: VLMInputs, suffixes: Sequence[list[int]]) -> VLMInputs:
    """Inputs with a suffix of its own appended to each row, padded on the left again."""
    longest = max(map(len, suffixes))
    pad = [[*row, *[model.cfg.pad_token_id] * (longest - len(row))] for row in suffixes]
    tokens = torch.tensor(pad, device=inputs.input_ids.device)
    fillers = torch.tensor([longest - len(row) for row in suffixes], device=tokens.device)
    return inputs.extended(tokens).without_last(fillers)


def logits_at_end(model: HookedVLM, inputs: VLMInputs) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the next token.

    Raises:
        ValueError: A row that is padded on the right.
    """
    inputs.require_left_padding("read the last position")
    return model(inputs, logits_to_keep=1)[:, -1]
