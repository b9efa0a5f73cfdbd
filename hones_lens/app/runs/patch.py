"""Activation patching into a run folder: the implementation of `hones patch`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from hones_lens import interventions
from hones_lens.analysis import (
    PatchPairs,
    Targets,
    as_patch_site,
    corrupted_by,
    counterfactual,
    heads_as_units,
    patch_activations,
    positions_of,
    targets_of,
)
from hones_lens.app.runs.data_choice import FILE_OPTIONS, say_if_fewer
from hones_lens.app.runs.folder import Opening, Run, save_picture
from hones_lens.app.runs.identity import model_identity
from hones_lens.data import CounterfactualPair, Example, counterfactual_pairs, load_examples, reads_files
from hones_lens.engine import usable_examples
from hones_lens.interventions import Box, Corruption
from hones_lens.model import HookedVLM, VLMInputs, open_image, require_choice
from hones_lens.results import Labelled, write_json
from hones_lens.tasks import load_task, own_prompt, takes_text, task_of_examples

CORRUPTIONS = ("noise", "blank", "blur", "shuffle", "mean")
DEFAULT_LIMIT = 64


@dataclass(frozen=True)
class PairsChoice:
    """Options that select the clean and corrupted inputs of a patching.

    The pairs are a picture of the user with a prompt and an answer; or corrupted examples of a data set; or,
    with neither a picture nor a corruption, counterfactual pairs of the shapes world.

    Attributes:
        task: Task of the examples or counterfactual pairs.
        kind: Kind of counterfactual pairs (see `counterfactual_pairs`).
        image, prompt, answer, foil: The user's clean input, its right answer, and another answer.
        corrupted_image, corrupted_prompt: The user's corrupted input, where it differs from the clean one.
        raw_prompt: Whether the user's prompts are given to the model as they are, and not in the task's form.
        corrupt: Name of a built-in corruption, one of `CORRUPTIONS`.
        strength: Standard deviations of the noise, or radius of the blur; None for the default.
        color: Colour of `blank`.
        corrupt_box: Restricts the corruption to a box: left, top, right, bottom.
        dataset, data_file, image_dir, split, limit, seed, on_error, encoding, allow_outside,
            allow_large_pictures: Options of `load_examples`; the seed is also that of noise and shuffling.
    """

    task: str = "vqa"
    kind: str | None = None
    image: str | None = None
    prompt: str | None = None
    answer: str | None = None
    foil: str | None = None
    corrupted_image: str | None = None
    corrupted_prompt: str | None = None
    raw_prompt: bool = False
    corrupt: str | None = None
    strength: float | None = None
    color: str | None = None
    corrupt_box: tuple[float, float, float, float] | None = None
    dataset: str = "shapes"
    data_file: str | None = None
    image_dir: str | None = None
    split: str = "dev"
    limit: int | None = None
    seed: int = 3407
    on_error: str = "raise"
    encoding: str = "utf-8"
    allow_outside: bool = False
    allow_large_pictures: bool = False

    def load(self, model: HookedVLM) -> PatchPairs:
        """Load and prepare the pairs.

        Raises:
            ValueError: Options contradict each other; also whatever the chosen source raises.
        """
        self.check()
        if self.image is not None:
            return self._user_pair(model)
        if self.corrupt is None:
            limit = DEFAULT_LIMIT if self.limit is None else self.limit
            facts = self._fact_pairs(limit)
            say_if_fewer(len(facts), self.limit, f"{self.task} pairs of {self.split!r}")
            return counterfactual(model, facts, load_task(self.task))
        task, examples = load_task(self.task), self._examples()
        say_if_fewer(len(examples), self.limit, f"{self.task} examples of {self.split!r} in {self.dataset}")
        if reads_files(self.dataset):
            examples, _ = usable_examples(model, task, examples, self.on_error)
        prompts = [task.target_prompt(example) for example in examples]
        inputs = model.prepare([example.image for example in examples], prompts)
        answers = [
            model.continuation(prompt, task.answer(example))
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        ids = [example.id for example in examples]
        pairs = corrupted_by(model, inputs, self.corruption(), answers, ids=ids)
        return replace(pairs, task=self.task)

    def _fact_pairs(self, limit: int) -> list[CounterfactualPair]:
        kind_of = task_of_examples(load_task(self.task), "shapes")
        return counterfactual_pairs(kind_of, self.kind, self.split, limit, self.seed)

    def _examples(self) -> list[Example]:
        files: dict[str, Any] = {name: getattr(self, name) for name in FILE_OPTIONS}
        limit = DEFAULT_LIMIT if self.limit is None else self.limit
        kind = task_of_examples(load_task(self.task), self.dataset, self.data_file)
        return load_examples(self.dataset, kind, self.split, limit, self.seed, **files)

    def first_pictures(self, pairs: PatchPairs) -> tuple[Image.Image, Image.Image | None, str]:
        """Clean picture, corrupted picture (None if there is none) and prompt of the first pair."""
        if self.image is not None:
            other = None if self.corrupted_image is None else open_image(self.corrupted_image)
            return open_image(self.image), other, self.asked(self.prompt)
        task = load_task(self.task)
        if pairs.facts:
            clean, corrupted = pairs.facts[0].clean, pairs.facts[0].corrupted
            return clean.image, corrupted.image, task.target_prompt(clean)
        example = self._examples()[0]
        return example.image, None, task.target_prompt(example)

    @property
    def has_foil(self) -> bool:
        """Whether there is another answer."""
        return self.foil is not None or (self.image is None and self.corrupt is None)

    def first_of(self) -> tuple[int, tuple[int, int], str, str]:
        """Number of pairs, and of the first one the picture's width and height, prompt and answer."""
        if self.image is not None:
            return 1, open_image(self.image).size, self.asked(self.prompt), str(self.answer)
        task = load_task(self.task)
        if self.corrupt is None:
            facts = self._fact_pairs(DEFAULT_LIMIT if self.limit is None else self.limit)
            first, n, answer = facts[0].clean, len(facts), facts[0].answers[0]
        else:
            examples = self._examples()
            first, n, answer = examples[0], len(examples), task.answer(examples[0])
        return n, first.image.size, task.target_prompt(first), answer

    def asked(self, text: str | None) -> str:
        """What the model is asked for a text of the user: the task's prompt around it, or the text alone.

        Raises:
            ValueError: No text where one is needed, or a text that the task's prompt has no place for.
        """
        if not self.raw_prompt:
            return own_prompt(load_task(self.task), text)
        if text is None:
            raise ValueError("--raw-prompt needs --prompt")
        return text

    def corruption(self) -> Corruption:
        """The built-in corruption that the options select."""
        strength = {} if self.strength is None else {"sigma": self.strength}
        radius = {} if self.strength is None else {"radius": self.strength}
        made = {
            "noise": lambda: interventions.gaussian_noise(seed=self.seed, **strength),
            "blank": lambda: interventions.blank(self.color or (128, 128, 128)),
            "blur": lambda: interventions.blur(**radius),
            "shuffle": lambda: interventions.patch_shuffle(self.seed),
            "mean": interventions.mean_image_token,
        }[str(self.corrupt)]()
        return made if self.corrupt_box is None else interventions.region(made, Box(*self.corrupt_box))

    def _user_pair(self, model: HookedVLM) -> PatchPairs:
        """The one pair that is made from the user's picture and prompt."""
        image, prompt, answer = str(self.image), self.asked(self.prompt), str(self.answer)
        clean = model.prepare(image, prompt)
        answer_ids = model.continuation(prompt, answer)
        corrupted_prompt = prompt if self.corrupted_prompt is None else self.asked(self.corrupted_prompt)
        foils = None if self.foil is None else [model.continuation(corrupted_prompt, self.foil)]

        def corrupted(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
            return model.prepare(self.corrupted_image or image, corrupted_prompt)

        corruption = corrupted if self.corrupt is None else self.corruption()
        return corrupted_by(model, clean, corruption, [answer_ids], foils, [Path(image).name])

    def check(self) -> None:
        """Check the options against each other.

        Raises:
            ValueError: Some contradict each other, lack another, or have nothing to act on; names them.
            FileNotFoundError: A picture that is not there.
        """
        if self.image is not None:
            self._check_own_picture()
        elif wrong := [name for name, value in self._own_texts.items() if value is not None]:
            raise ValueError(f"--{wrong[0]} goes with --image")
        elif self.raw_prompt:
            raise ValueError("--raw-prompt goes with --image")
        elif self.corrupt is None and self.dataset != "shapes":
            raise ValueError(
                f"counterfactual pairs are of the shapes world; to patch examples of {self.dataset!r} say "
                "how they are corrupted: --corrupt"
            )
        if self.kind is not None and (self.image is not None or self.corrupt is not None):
            raise ValueError("--kind is for counterfactual pairs")
        self._check_corruption()
        if self.image is None and self.corrupt is None:
            self._fact_pairs(1)

    def _check_corruption(self) -> None:
        unused = {
            "strength": self.strength is not None and self.corrupt not in ("noise", "blur"),
            "color": self.color is not None and self.corrupt != "blank",
            "corrupt-box": self.corrupt_box is not None and self.corrupt is None,
        }
        for name, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"--{name} has nothing to act on with --corrupt {self.corrupt}")
        if self.corrupt is not None:
            require_choice("corruption", self.corrupt, CORRUPTIONS)
            self.corruption()

    @property
    def _own_texts(self) -> dict[str, str | None]:
        """Options that go with a picture of the user alone."""
        texts = {"prompt": self.prompt, "answer": self.answer, "corrupted-image": self.corrupted_image}
        return texts | {"corrupted-prompt": self.corrupted_prompt, "foil": self.foil}

    def _check_own_picture(self) -> None:
        required = ["answer"]
        if self.raw_prompt or takes_text(load_task(self.task)):
            required = ["prompt", "answer"]
        if missing := [name for name in required if self._own_texts[name] is None]:
            raise ValueError(f"--image needs --{' and --'.join(missing)} too")
        texts = (self.corrupted_image, self.corrupted_prompt, self.corrupt)
        given = [value for value in texts if value is not None]
        if not given or (self.corrupt is not None and len(given) > 1):
            raise ValueError(
                "--image needs --corrupt, or else --corrupted-image or --corrupted-prompt or both"
            )
        for picture in (self.image, self.corrupted_image):
            if picture is not None:
                open_image(picture)
        self.asked(self.prompt)


def start_patching(
    model: HookedVLM,
    pairs: PatchPairs,
    out: str | Path,
    choice: PairsChoice,
    options: dict[str, Any],
    *,
    opening: Opening | None = None,
    **asked: Any,
) -> Run:
    """Open a run folder for one patching.

    Args:
        model, pairs, out, choice: What is patched, and where it is kept.
        options: Those of `patch_activations`, JSON values or a Box.
        opening: As for `Run`.
        asked: Options of the command; those that `options` has not are recorded too.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    groups, rest = options.get("groups"), {k: v for k, v in asked.items() if k not in options}
    run = Run(
        out,
        {
            **rest,
            "model": model.cfg.model_name,
            **model_identity(model),
            "device": model.cfg.device.type,
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            **asdict(choice),
            "pairs": pairs_hash(pairs, whole=options.get("metric") == "log_prob"),
            "patch": {**options, "groups": groups and [str(group) for group in groups]},
        },
        opening=opening,
    )
    run.files("pair", lambda: _save_first_pair(model, run, pairs, choice))
    return run


def _save_first_pair(model: HookedVLM, run: Run, pairs: PatchPairs, choice: PairsChoice) -> list[Path]:
    """Save the first pair for the report: its pictures, its texts, and the positions of its patches."""
    clean, corrupted, prompt = choice.first_pictures(pairs)
    pictures = {"clean": clean, "corrupted": corrupted}
    files = {name: None if picture is None else f"pair-{name}.png" for name, picture in pictures.items()}
    written = [
        save_picture(pictures[name], run.path(file)) for name, file in files.items() if file is not None
    ]
    inputs = pairs.clean[0].without_padding()
    fields = {
        "id": pairs.ids[0],
        "prompt": prompt,
        "answer": _text_of(model, pairs.answer, pairs.answer_ids),
        "foil": None if pairs.foil is None else _text_of(model, pairs.foil, pairs.foil_ids),
        "image_mask": "".join(str(int(is_image)) for is_image in inputs.image_mask[0]),
        "grids": inputs.grids[0],
        "regions": inputs.regions[0],
        "layouts": [asdict(layout) for layout in inputs.layouts[0]] if inputs.layouts else [],
    }
    write_json(run.path("pair.json"), {"kind": "patch-pair", **files, **fields})
    return [*written, run.path("pair.json")]


def _text_of(model: HookedVLM, tokens: Tensor, answers: Sequence[Sequence[int]]) -> str:
    """The first pair's answer as text: all of it where it is known, else its token."""
    ids = list(answers[0]) if answers else tokens[:1].tolist()
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip() or model.tokenizer.decode(ids)


def run_patching(model: HookedVLM, run: Run, pairs: PatchPairs, options: dict[str, Any]) -> Labelled:
    """Load the patching from the folder, or run it and save it with its figure as PNG and SVG."""

    def patch() -> Labelled:
        result = patch_activations(model, pairs, journal=run.journal("patch"), **options)
        if len(result.axes) in (1, 2, 3):
            figure = result.plot()
            for kind in ("png", "svg"):
                figure.save(run.path(f"patch.{kind}"))
        run.log(f"patch: {result.what}; {'; '.join(result.notes)}")
        return result

    return run.stage("patch", Labelled, patch, beside=["patch.png", "patch.svg"])


def patched_targets(model: HookedVLM, options: dict[str, Any]) -> Targets:
    """What the options of `patch_activations` name in a model, or in its sizes.

    Raises:
        ValueError: A layer, head or unit that is not there.
    """
    site = as_patch_site(options["what"])
    wanted = heads_as_units(site, options.get("heads"), options.get("layers"), options.get("units"))
    return targets_of(site, model.cfg, *wanted)


def check_patches(model: HookedVLM, pairs: PatchPairs, options: dict[str, Any]) -> None:
    """Check that the model and the pairs have what the options name.

    Raises:
        ValueError: A layer, head, unit, token group or box that is not there, or positions of pairs that
            have several prompts.
    """
    patched_targets(model, options)
    site = as_patch_site(options["what"])
    positions_of(model, pairs, site, options["by"], options.get("groups"))


def pairs_hash(pairs: PatchPairs, whole: bool = False) -> str:
    """A hash of the pairs' ids, tokens, pixels and answers: the next tokens, or the `whole` ones."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((pairs.ids, pairs.answer.tolist())).encode())
    if pairs.foil is not None:
        digest.update(repr(pairs.foil.tolist()).encode())
    if whole and any(len(ids) > 1 for ids in pairs.answer_ids):
        digest.update(repr(pairs.answer_ids).encode())
    for inputs in (pairs.clean, pairs.corrupted):
        for tensor in (inputs.input_ids, inputs.pixel_values):
            if tensor is not None:
                digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
