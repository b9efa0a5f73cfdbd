"""What the model answers before anything is patched, for `hones patch` and its report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hones_lens.analysis import PairAnswers, PatchPairs, pair_answers
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.patch import PairsChoice
from hones_lens.model import HookedVLM
from hones_lens.results import write_json


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

    def save(self, run: Run) -> None:
        """Write what the report shows into a run folder."""
        data: dict[str, Any] = {"clean": self.clean, "corrupted": self.corrupted}
        data |= {"text": str(self.answers), "problem": self.answers.problem}
        file = run.path("answers.json")
        write_json(file, {"kind": "patch-answers", **data})
        run.record("answers", [file])


def unpatched_answers(
    model: HookedVLM, pairs: PatchPairs, choice: PairsChoice, batch_size: int = 32
) -> Baseline:
    """Run the pairs unpatched, and generate the answers to the first one's two inputs."""
    first = pairs[:1].without_answer_prefix()
    clean, corrupted = (str(model.generate(inputs)[0]) for inputs in (first.clean, first.corrupted))
    asked = "" if choice.image is None else choice.asked(choice.prompt)
    return Baseline(pair_answers(model, pairs, batch_size), clean, corrupted, asked)
