"""Pairs of clean and corrupted inputs, with the two tokens that distinguish their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hones_lens.data import CounterfactualPair
from hones_lens.engine import as_task
from hones_lens.interventions import Corruption, Group, token_mask
from hones_lens.model import HookedVLM, VLMInputs
from hones_lens.tasks import Task

__all__ = [
    "Corruption",
    "PatchPairs",
    "corrupted_by",
    "counterfactual",
    "logits_at_end",
    "with_shared_prefix",
]


@dataclass(frozen=True, eq=False)
class PatchPairs:
    """A batch of clean prompts and the same batch corrupted, token for token in the same places.

    Attributes:
        clean, corrupted: Prepared; of one shape, padded alike, image tokens and masks in the same places.
            Where the answers begin alike, what they share is at the end of both.
        answer: The token that comes next on the clean input, [batch].
        foil: The one that comes next on the corrupted input, [batch]; None where there is no other answer.
        ids: Names of the pairs, for error messages and results.
        facts: The counterfactual pairs that they were made from, if they were.
        task: Whose prompts those were given: its name, or the task itself.
        shared: How many tokens of the answers are at the end of each, [batch]; () for none.
    """

    clean: VLMInputs
    corrupted: VLMInputs
    answer: Int[Tensor, " batch"]
    foil: Int[Tensor, " batch"] | None
    ids: tuple[str, ...]
    facts: tuple[CounterfactualPair, ...] = ()
    task: str | Task = ""
    shared: tuple[int, ...] = ()

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
            for name in ("ids", "facts", "shared")
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
        sides = {"clean": self.corrupted, "corrupted": self.clean}
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


def corrupted_by(
    model: HookedVLM,
    inputs: VLMInputs,
    corruption: Corruption,
    answers: Int[Tensor, " batch"] | Sequence[int],
    foils: Int[Tensor, " batch"] | Sequence[int] | None = None,
    ids: Sequence[str] = (),
) -> PatchPairs:
    """Pairs of inputs and their corrupted versions.

    Args:
        model, inputs: The clean batch, from `model.prepare`.
        corruption: Takes the model and VLMInputs, and returns VLMInputs of the same shape (see
            `hones_lens.interventions.corruptions`).
        answers: The token that is right on the clean inputs, one a row.
        foils: Another token, one a row.
        ids: Names of the rows; default: their numbers.

    Raises:
        ValueError: The corruption moved tokens, or changed nothing in a row; another number of answers than
            of rows.
    """
    clean = model.as_inputs(inputs)
    corrupted = model.as_inputs(corruption(model, clean))
    device = clean.input_ids.device
    foil = None if foils is None else torch.as_tensor(foils, device=device)
    names = tuple(ids) or tuple(f"row {row}" for row in range(len(clean)))
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


def with_shared_prefix(
    model: HookedVLM,
    clean: VLMInputs,
    corrupted: VLMInputs,
    answers: Sequence[Sequence[list[int]]],
    ids: tuple[str, ...],
) -> PatchPairs:
    """Pairs in which the tokens that both answers begin with are appended to the prompts.

    Args:
        model: The model.
        clean, corrupted: The prompts.
        answers: Of each pair the ids of the right answers to the clean and to the corrupted prompt, as they
            follow it (`model.continuation`).
        ids: Names of the pairs.

    Raises:
        ValueError: Both answers of a pair are the same tokens.
    """
    eos_ids = model.cfg.eos_token_ids
    shared, answer, foil = [], [], []
    for (a, b), name in zip(answers, ids, strict=True):
        a, b = ([*answer_ids, eos_ids[0]] if eos_ids else answer_ids for answer_ids in (a, b))
        n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if n is None:
            raise ValueError(f"pair {name!r}: no token tells its two answers apart")
        shared.append(a[:n])
        answer.append(a[n])
        foil.append(b[n])
    device = clean.input_ids.device
    if any(shared):
        clean, corrupted = (_append_tokens(model, inputs, shared) for inputs in (clean, corrupted))
    right, wrong = torch.tensor(answer, device=device), torch.tensor(foil, device=device)
    counts = tuple(map(len, shared)) if any(shared) else ()
    return PatchPairs(clean, corrupted, right, wrong, ids, shared=counts)


def _append_tokens(model: HookedVLM, inputs: VLMInputs, suffixes: Sequence[list[int]]) -> VLMInputs:
    """Inputs with a suffix of its own appended to each row, padded on the left again."""
    longest = max(map(len, suffixes))
    pad = [[*row, *[model.cfg.pad_token_id] * (longest - len(row))] for row in suffixes]
    tokens = torch.tensor(pad, device=inputs.input_ids.device)
    fillers = torch.tensor([longest - len(row) for row in suffixes], device=tokens.device)
    return inputs.extended(tokens).without_last(fillers)


def logits_at_end(model: HookedVLM, inputs: VLMInputs) -> Float[Tensor, "batch d_vocab"]:
    """Logits of the next token."""
    return model(inputs, logits_to_keep=1)[:, -1]
