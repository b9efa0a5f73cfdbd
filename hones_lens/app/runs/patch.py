"""One activation patching into a run folder: what `hones patch` does."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from hones_lens import interventions
from hones_lens.analysis import (
    PatchPairs,
    as_patch_site,
    corrupted_by,
    counterfactual,
    patch_activations,
    positions_of,
    targets_of,
    with_shared_prefix,
)
from hones_lens.app.runs.folder import Run, weights_hash
from hones_lens.data import Example, counterfactual_pairs, load_examples
from hones_lens.interventions import Box, Corruption
from hones_lens.model import HookedVLM, open_image
from hones_lens.results import Labelled, write_json
from hones_lens.tasks import load_task

CORRUPTIONS = ("noise", "blank", "blur", "shuffle", "mean")
DEFAULT_LIMIT = 64
_TIMED = 8  # patches that a plan times


@dataclass(frozen=True)
class PairsChoice:
    """Which clean and corrupted inputs are patched.

    A picture with its own prompt and answer; or examples of a data set, corrupted; or, with neither a picture
    nor a corruption, counterfactual pairs of the shapes world.

    Attributes:
        task: Of examples and counterfactual pairs.
        kind: Of counterfactual pairs (see `counterfactual_pairs`).
        image, prompt, answer, foil: The user's own clean input, what is right on it, and another answer.
        corrupted_image, corrupted_prompt: The user's own corrupted input, where it differs.
        corrupt: A built-in corruption, of `CORRUPTIONS`.
        strength: Standard deviations of the noise, or radius of the blur; None for the default.
        color: Of `blank`.
        corrupt_box: Corrupt there alone: left, top, right, bottom.
        dataset, data_file, image_dir, split, limit, seed, on_error: Of the examples (see `load_examples`);
            the seed is that of noise and shuffling too.
    """

    task: str = "vqa"
    kind: str | None = None
    image: str | None = None
    prompt: str | None = None
    answer: str | None = None
    foil: str | None = None
    corrupted_image: str | None = None
    corrupted_prompt: str | None = None
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

    def load(self, model: HookedVLM) -> PatchPairs:
        """The pairs, prepared.

        Raises:
            ValueError: Options that don't go together, or what the chosen source raises.
        """
        self._check()
        if self.image is not None:
            return self._own(model)
        if self.corrupt is None:
            limit = DEFAULT_LIMIT if self.limit is None else self.limit
            task = load_task(self.task)
            kind_of = task.examples_of or task.name
            drawn = counterfactual_pairs(kind_of, self.kind, self.split, limit, self.seed)
            return counterfactual(model, drawn, task)
        task, examples = load_task(self.task), self._examples()
        prompts = [task.target_prompt(example) for example in examples]
        inputs = model.prepare([example.image for example in examples], prompts)
        answers = [
            model.continuation(prompt, task.answer(example))[0]
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        ids = [example.id for example in examples]
        made = corrupted_by(model, inputs, self.corruption(), answers, ids=ids)
        return replace(made, task=self.task)

    def _examples(self) -> list[Example]:
        files = {"data_file": self.data_file, "image_dir": self.image_dir, "on_error": self.on_error}
        task, limit = load_task(self.task), self.limit or DEFAULT_LIMIT
        return load_examples(
            self.dataset, task.examples_of or task.name, self.split, limit, self.seed, **files
        )

    def first(self, pairs: PatchPairs) -> tuple[Image.Image, Image.Image | None, str]:
        """The first of these pairs: its clean picture, its corrupted one if it is a picture, its prompt."""
        if self.image is not None:
            other = None if self.corrupted_image is None else open_image(self.corrupted_image)
            return open_image(self.image), other, str(self.prompt)
        task = load_task(self.task)
        if pairs.facts:
            clean, corrupted = pairs.facts[0].clean, pairs.facts[0].corrupted
            return clean.image, corrupted.image, task.target_prompt(clean)
        example = self._examples()[0]
        return example.image, None, task.target_prompt(example)

    def corruption(self) -> Corruption:
        """The built-in corruption that was asked for."""
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

    def _own(self, model: HookedVLM) -> PatchPairs:
        """One pair: the user's picture and prompt."""
        image, prompt, answer = str(self.image), str(self.prompt), str(self.answer)
        clean = model.prepare(image, prompt)
        right = model.continuation(prompt, answer)
        if self.corrupt is not None:
            foils = None
            if self.foil is not None:
                pair = (right, model.continuation(prompt, self.foil))
                apart = with_shared_prefix(model, clean, clean, [pair], (Path(image).name,))
                clean, right, foils = apart.clean, apart.answer.tolist(), apart.foil
            return corrupted_by(model, clean, self.corruption(), right[:1], foils, [Path(image).name])
        other = self.corrupted_prompt or prompt
        corrupted = model.prepare(self.corrupted_image or image, other)
        if self.foil is None:
            return corrupted_by(model, clean, lambda m, inputs: corrupted, right[:1], ids=[Path(image).name])
        answers = (right, model.continuation(other, self.foil))
        return with_shared_prefix(model, clean, corrupted, [answers], (Path(image).name,))

    def _check(self) -> None:
        own = {"prompt": self.prompt, "answer": self.answer}
        others = {"corrupted-image": self.corrupted_image, "corrupted-prompt": self.corrupted_prompt}
        if self.image is not None:
            if missing := [name for name, value in own.items() if value is None]:
                raise ValueError(f"--image needs --{' and --'.join(missing)} too")
            given = [name for name, value in {**others, "corrupt": self.corrupt}.items() if value is not None]
            if not given or (self.corrupt is not None and len(given) > 1):
                raise ValueError(
                    "--image needs --corrupt, or else --corrupted-image or --corrupted-prompt or both"
                )
        elif wrong := [n for n, v in {**own, **others, "foil": self.foil}.items() if v is not None]:
            raise ValueError(f"--{wrong[0]} goes with --image")
        elif self.corrupt is None and self.dataset != "shapes":
            raise ValueError(
                f"counterfactual pairs are of the shapes world; to patch examples of {self.dataset!r} say "
                "how they are corrupted: --corrupt"
            )
        if self.corrupt is not None and self.corrupt not in CORRUPTIONS:
            raise ValueError(f"unknown corruption {self.corrupt!r}; valid: {', '.join(CORRUPTIONS)}")
        if self.kind is not None and (self.image is not None or self.corrupt is not None):
            raise ValueError("--kind is for counterfactual pairs")
        unread = {
            "strength": self.strength is not None and self.corrupt not in ("noise", "blur"),
            "color": self.color is not None and self.corrupt != "blank",
            "corrupt-box": self.corrupt_box is not None and self.corrupt is None,
        }
        for name, without_use in unread.items():
            if without_use:
                raise ValueError(f"--{name} has nothing to act on with --corrupt {self.corrupt}")


def start_patching(
    model: HookedVLM, pairs: PatchPairs, out: str | Path, choice: PairsChoice, options: dict[str, Any]
) -> Run:
    """Open a run folder for one patching; options are those of `patch_activations`, JSON values or a Box.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    groups = options.get("groups")
    run = Run(
        out,
        {
            "model": model.cfg.model_name,
            "weights": weights_hash(model),
            "device": model.cfg.device.type,
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            **asdict(choice),
            "pairs": pairs_hash(pairs),
            "patch": {**options, "groups": groups and [str(group) for group in groups]},
        },
    )
    if not run.path("pair.json").exists():
        _save_first(model, run, pairs, choice)
    return run


def _save_first(model: HookedVLM, run: Run, pairs: PatchPairs, choice: PairsChoice) -> None:
    """Keep the first pair for the report: its pictures, texts, and where its patches lie."""
    clean, corrupted, prompt = choice.first(pairs)
    pictures = {"clean": clean, "corrupted": corrupted}
    files = {name: None if picture is None else f"pair-{name}.png" for name, picture in pictures.items()}
    for name, file in files.items():
        if file is not None:
            pictures[name].save(run.path(file))
    inputs, decode = pairs.clean[0].without_padding(), model.tokenizer.decode
    about = {
        "id": pairs.ids[0],
        "prompt": prompt,
        "answer": decode([int(pairs.answer[0])]),
        "foil": None if pairs.foil is None else decode([int(pairs.foil[0])]),
        "image_mask": "".join(str(int(here)) for here in inputs.image_mask[0]),
        "grids": inputs.grids[0],
        "regions": inputs.regions[0],
        "leading_tokens": inputs.leading_tokens,
    }
    write_json(run.path("pair.json"), {"kind": "patch-pair", **files, **about})


def run_patching(model: HookedVLM, run: Run, pairs: PatchPairs, options: dict[str, Any]) -> Labelled:
    """The patching, from the folder if it is there, with its figure as PNG and SVG."""

    def patch() -> Labelled:
        result = patch_activations(model, pairs, journal=run.journal("patch"), **options)
        if len(result.axes) in (1, 2, 3):
            figure = result.plot()
            for kind in ("png", "svg"):
                figure.save(run.path(f"patch.{kind}"))
        run.log(f"patch: {result.what}; {'; '.join(result.notes)}")
        return result

    return run.stage("patch", Labelled, patch)


def plan_patching(model: HookedVLM, pairs: PatchPairs, options: dict[str, Any]) -> list[str]:
    """Lines that tell how many patches there are, and about how long they take: some are timed."""
    site = as_patch_site(options["what"])
    targets = targets_of(site, model.cfg, options.get("layers"), options.get("units"))
    n_groups = len(positions_of(model, pairs, site, options["by"], options.get("groups")))
    middle = len(targets.cells) // 2
    some = targets.cells[middle : middle + _TIMED]
    sets = {str(i): [(n, unit) for n, units in cell for unit in units or ()] for i, cell in enumerate(some)}
    if all(sets.values()):
        chosen: dict[str, Any] = {"layers": None, "units": sets}
    else:  # whole layers
        chosen = {"layers": sorted({layer for cell in some for layer, _ in cell})}
    batch = pairs[: options.get("batch_size", 32)]
    timed: dict[str, Any] = {**options, **chosen, "progress": False, "draws": 0, "raw": True}
    started = time.perf_counter()
    patch_activations(model, batch, **timed)
    each = (time.perf_counter() - started) / (len(some) * n_groups * len(batch))
    patches = len(targets.cells) * n_groups
    rows, tokens = patches * len(pairs), pairs.clean.input_ids.shape[1]
    return [
        f"{model.cfg.model_name}: {options['what']} by {options['by']}, {len(pairs)} pairs of up to {tokens} "
        "tokens",
        f"  {patches:,} patches × {len(pairs)} pairs = {rows:,} rows, {1000 * each:.2g} ms each as timed in "
        f"the middle, about {rows * each:.0f} s",
    ]


def pairs_hash(pairs: PatchPairs) -> str:
    """A hash of the pairs' ids, tokens, pixels and answers."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((pairs.ids, pairs.answer.tolist())).encode())
    if pairs.foil is not None:
        digest.update(repr(pairs.foil.tolist()).encode())
    for inputs in (pairs.clean, pairs.corrupted):
        for tensor in (inputs.input_ids, inputs.pixel_values):
            if tensor is not None:
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
