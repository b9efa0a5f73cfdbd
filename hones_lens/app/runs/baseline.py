"""What the model answers before anything is patched, for `hones patch` and its report."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hones_lens.analysis import PairAnswers, PatchPairs, pair_answers
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.patch import PairsChoice
from hones_lens.model import HookedVLM, VLMInputs
from hones_lens.results import read_json, write_json


@dataclass(frozen=True, eq=False)
class Baseline:
    """The unpatched runs of all pairs.

    Attributes:
        answers: How far the model prefers the right answers.
        clean, corrupted: What it generates for the first pair's two inputs.
        asked: The prompt, where it is made from a text of the user; empty for a data set's own prompts.
    """

    answers: PairAnswers
    clean: str
    corrupted: str
    asked: str = ""

    def lines(self) -> list[str]:
        """What was asked and answered, as lines for the terminal."""
        prompt = [f"prompt: {self.asked!r}"] if self.asked else []
        which = "" if len(self.answers.clean) == 1 else ", first pair"
        told = {"clean": self.clean, "corrupted": self.corrupted}
        return [*prompt, *(f"{side}{which}: the model answers {text!r}" for side, text in told.items())]

    def check(self) -> None:
        """Check that the clean run prefers the right answer in more than half of the pairs.

        Raises:
            ValueError: Nothing can be concluded from patching these pairs; says why.
        """
        if self.answers.problem:
            raise ValueError(
                f"nothing can be concluded from patching: {self.answers.problem}; the model answers "
                f"{self.clean!r} to the clean input and {self.corrupted!r} to the corrupted one "
                "(--force patches all the same)"
            )

    def save(self, file: Path) -> None:
        """Write it as JSON, with what the report shows in words."""
        data: dict[str, Any] = {"clean": self.clean, "corrupted": self.corrupted, "asked": self.asked}
        data |= {"text": str(self.answers), "problem": self.answers.problem}
        data |= {"margins": self.answers.to_json(), "has_foil": self.answers.has_foil}
        write_json(file, {"kind": "patch-answers", **data})

    @classmethod
    def load(cls, file: Path) -> Baseline:
        """Read what `save` wrote."""
        data = read_json(file, "patch-answers")
        answers = PairAnswers.from_json(data["margins"], data["has_foil"])
        return cls(answers, data["clean"], data["corrupted"], data["asked"])


def unpatched_answers(
    model: HookedVLM, run: Run, pairs: PatchPairs, choice: PairsChoice, batch_size: int = 32
) -> Baseline:
    """Load from the folder or compute: the unpatched runs of all pairs, and the answers to the first one."""

    def answer() -> Baseline:
        journal, first = run.journal("answers"), pairs[:1].without_answer_prefix()
        clean = _generated(model, first.clean, journal, "generated/clean")
        corrupted = _generated(model, first.corrupted, journal, "generated/corrupted")
        asked = "" if choice.image is None else choice.asked(choice.prompt)
        return Baseline(pair_answers(model, pairs, batch_size, journal), clean, corrupted, asked)

    return run.stage("answers", Baseline, answer)


def _generated(model: HookedVLM, inputs: VLMInputs, journal: MutableMapping[str, Any], key: str) -> str:
    if key not in journal:
        journal[key] = str(model.generate(inputs)[0])
    return journal[key]


def require_meaning(run: Run, baseline: Baseline) -> None:
    """As `Baseline.check`; where nothing can be concluded and nothing was patched yet, the folder is emptied.

    Raises:
        ValueError: Nothing can be concluded.
    """
    try:
        baseline.check()
    except ValueError:
        if not run.path("patch.json").exists() and not run.path("patch.journal.jsonl").exists():
            run.withdraw()
        raise
