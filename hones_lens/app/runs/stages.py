"""The stages of a run, one after the other, into a run folder: what `hones demo` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hones_lens import engine
from hones_lens.analysis import head_attention, image_token_lens, logit_lens, promoted_tokens
from hones_lens.app.report.run_folder import read_view as read_view
from hones_lens.app.report.run_view import ExampleView
from hones_lens.app.runs.folder import Run, examples_hash, weights_hash
from hones_lens.data import Example, load_examples
from hones_lens.engine import Tally
from hones_lens.hones import (
    METHODS,
    HeadNeuronFlow,
    HeadScores,
    HeldOutHeads,
    MaskingResult,
    NeuronScores,
    SteeringTable,
    attribute_neurons,
    compare_steering,
    head_neuron_flow,
    load_masking,
    localize_heads,
    masking_curve,
    remeasure_heads,
    save_heads,
    save_masking,
    save_neurons,
)
from hones_lens.interventions import zero_neurons
from hones_lens.model import HookedVLM
from hones_lens.results import Component, write_json
from hones_lens.tasks import load_task

# Examples for discovery and for the held-out test; ranking fifty candidates is fifty prompts.
DEFAULT_SIZES = {False: (420, 84), True: (16, 12)}
DEV_SIZES = {False: 210, True: 24}
OTHER_RANKINGS = (
    "activation_probability",
    "mean_activation",
    "direct",
    "gradient_times_activation",
    "random",
)


# Matched random sets beside every other ranking's neurons.
OTHERS_CONTROLS = 5
_EXAMPLE_TEXTS = ("prompt", "target", "answer", "answer_masked", "head", "masked_label", "region")
_MOST_HEADS = 64  # heads up to which all of a model's are looked at
_LENS_TOKENS = 5
_FLOW_EXAMPLES = 96


@dataclass(frozen=True)
class DataChoice:
    """Which examples a run reads: a data set, its files, a seed, and how many of which splits.

    Splits are names, or split files of the data set (see `load_examples`).
    """

    dataset: str = "shapes"
    data_file: str | None = None
    image_dir: str | None = None
    seed: int = 3407
    discovery_split: str = "discovery"
    dev_split: str = "dev"
    held_out: str = "test"
    n_discovery: int | None = None
    n_dev: int | None = None
    n_held_out: int | None = None
    on_error: str = "raise"

    def discovery(self, task: str) -> list[Example]:
        """The examples that heads and neurons are found on."""
        default = DEFAULT_SIZES[load_task(task).ranks][0]
        return self._load(task, self.discovery_split, self.n_discovery or default)

    def dev(self, task: str) -> list[Example]:
        """The examples that scales are learned and chosen on."""
        return self._load(task, self.dev_split, self.n_dev or DEV_SIZES[load_task(task).ranks])

    def test(self, task: str) -> list[Example]:
        """The held-out examples that neurons are masked on.

        Raises:
            ValueError: They would be the discovery examples.
        """
        if self.held_out == self.discovery_split:
            raise ValueError(
                "neurons can't be judged on the split that selected them: choose another --split"
            )
        return self._load(task, self.held_out, self.n_held_out or DEFAULT_SIZES[load_task(task).ranks][1])

    def _load(self, task: str, split: str, limit: int) -> list[Example]:
        return load_examples(
            self.dataset,
            task,
            split,
            limit,
            self.seed,
            data_file=self.data_file,
            image_dir=self.image_dir,
            on_error=self.on_error,
        )


def start_run(model: HookedVLM, task: str, data: DataChoice, out: str | Path, **settings: Any) -> Run:
    """Open a run folder whose settings tell model, weights and examples by their hashes.

    Raises:
        ValueError: The folder holds a run with other settings, or an example is in both splits.
    """
    chosen, discovery, test = load_task(task), data.discovery(task), data.test(task)
    if shared := sorted({example.id for example in discovery} & {example.id for example in test}):
        raise ValueError(
            f"{len(shared)} {task} examples, the first {shared[0]!r}, are both in {data.discovery_split!r} "
            f"and in {data.held_out!r}: what they select can't be judged on them"
        )
    return Run(
        out,
        {
            **_common_settings(model, task, data),
            "held_out_split": data.held_out,
            "discovery": examples_hash(chosen, discovery),
            "test": examples_hash(chosen, test),
            **settings,
        },
    )


def _common_settings(model: HookedVLM, task: str, data: DataChoice) -> dict[str, Any]:
    """What every run's settings begin with."""
    return {
        "model": model.cfg.model_name,
        "weights": weights_hash(model),
        "device": model.cfg.device.type,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "task": task,
        "dataset": data.dataset,
        "seed": data.seed,
    }


def find_heads(
    model: HookedVLM, run: Run, task: str, data: DataChoice, top_k: int | None = None, **options: Any
) -> HeadScores:
    """Stage H1, from the folder if it is there; options are those of `localize_heads`."""
    file = run.path("heads.json")
    if not file.exists():
        examples = data.discovery(task)
        tally, journal = Tally(), run.journal("heads")
        heads = localize_heads(model, task, examples, top_k, journal=journal, tally=tally, **options)
        save_heads(heads, run.path("hones/heads.json"))
        heads.save(file)
        run.log(f"heads: {len(heads.top())} critical of {heads.scores.numel()}; {tally}")
    return HeadScores.load(file)


def heads_again(
    model: HookedVLM, run: Run, task: str, data: DataChoice, heads: HeadScores
) -> HeldOutHeads | None:
    """The critical heads on the held-out split, from the folder if they are there; None without any."""
    file = run.path("heads-held-out.json")
    if not file.exists():
        if not heads.top():
            return None
        journal = run.journal("heads-held-out")
        remeasure_heads(model, task, data.test(task), heads, journal=journal).save(file)
        run.log("heads: measured again on the held-out split")
    return HeldOutHeads.load(file)


def find_neurons(
    model: HookedVLM, run: Run, task: str, data: DataChoice, heads: HeadScores, ratio: float | None = None
) -> NeuronScores:
    """Stages H2 and H3, from the folder if they are there."""
    file = run.path("neurons.json")
    if not file.exists():
        neurons = attribute_neurons(model, task, data.discovery(task), heads, ratio)
        save_neurons(neurons, run.path("hones/neurons_top1pct.json"))
        neurons.save(file)
        run.log(f"neurons: {neurons.count()} of {neurons.scores.numel()}")
    return NeuronScores.load(file)


def mask_neurons(
    model: HookedVLM, run: Run, task: str, data: DataChoice, neurons: NeuronScores, n_controls: int = 20
) -> list[MaskingResult]:
    """Stage H4 on the held-out split, from the folder if it is there."""
    file = run.path("masking.json")
    if not file.exists():
        journal = run.journal("masking")
        examples = data.test(task)
        save_masking(
            file, masking_curve(model, task, examples, neurons, n_controls=n_controls, journal=journal)
        )
        run.log("masking: done")
    return load_masking(file)


def mask_others(
    model: HookedVLM,
    run: Run,
    task: str,
    data: DataChoice,
    ratio: float,
    names: Sequence[str] = OTHER_RANKINGS,
) -> dict[str, MaskingResult]:
    """Other rankings of METHOD under the same budget, each masked on the held-out split.

    Beside each are matched random sets of its own.
    """
    file = run.path("others.json")
    if not file.exists():
        discovery = data.discovery(task)
        sets = []
        for name in names:
            scores = attribute_neurons(model, task, discovery, ratio=ratio, method=name)
            sets.append([(c.layer, c.index) for c in scores.top()])
        journal = run.journal("others")
        examples, options = data.test(task), {"n_controls": OTHERS_CONTROLS, "journal": journal}
        found = masking_curve(model, task, examples, sets, **options)
        save_masking(file, [replace(result, method=name) for name, result in zip(names, found, strict=True)])
        run.log(f"other rankings: {', '.join(names)}")
    return {result.method: result for result in load_masking(file)}


def steering_methods(names: Sequence[str] | None) -> tuple[str, ...]:
    """Methods of steering by our names, or by those of HONES's configurations.

    Raises:
        ValueError: An unknown one; lists the valid ones.
    """
    known = {name.lower(): name for name in METHODS}
    known |= {name.lower().replace("-", "_").replace(" ", "_"): name for name in METHODS}
    known |= {"rand_neuron": "RandNeuron", "ours": "HONES", "ours_no_kl": "HONES without KL"}
    known["hones_no_kl"] = "HONES without KL"
    out = []
    for name in METHODS if names is None else names:
        if name.lower() not in known:
            raise ValueError(f"unknown method of steering {name!r}; valid: {', '.join(METHODS)}")
        out.append(known[name.lower()])
    return tuple(out)


def start_steering(
    model: HookedVLM,
    task: str,
    data: DataChoice,
    out: str | Path,
    neurons: NeuronScores,
    options: Mapping[str, Any],
) -> Run:
    """Open a run folder for steering; options are those of `compare_steering`.

    Raises:
        ValueError: The folder holds a run with other settings.
    """
    chosen = load_task(task)
    return Run(
        out,
        {
            **_common_settings(model, task, data),
            "dev": examples_hash(chosen, data.dev(task)),
            "test": examples_hash(chosen, data.test(task)),
            "neurons": [[c.layer, c.index] for c in neurons.top(options.get("k"))],
            **{**options, "config": asdict(options["config"])},
        },
    )


def steer_neurons(
    model: HookedVLM,
    run: Run,
    task: str,
    data: DataChoice,
    neurons: NeuronScores,
    options: Mapping[str, Any],
) -> SteeringTable:
    """Stage H5, from the folder if it is there; options are those of `compare_steering`."""
    file = run.path("steering.json")
    if not file.exists():
        dev, test, journal = data.dev(task), data.test(task), run.journal("steering")
        table = compare_steering(model, task, dev, test, neurons, journal=journal, **options)
        table.save(file)
        if "HONES" in options["methods"]:
            table.scales().save_hones(run.path("neuron_scales.json"))
        run.log(f"steering: {', '.join(options['methods'])}")
    return SteeringTable.load(file)


def look_at_examples(
    model: HookedVLM,
    task: str,
    data: DataChoice,
    heads: Sequence[Component],
    neurons: NeuronScores,
    count: int = 2,
) -> list[ExampleView]:
    """Answers with and without the neurons, where heads look from the last prompt token, and logit lenses.

    Every head of a small model can be chosen, else those given; the first of them is shown.
    """
    chosen = load_task(task)
    masked = zero_neurons((c.layer, c.index) for c in neurons.top())
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    looking = every if len(every) <= _MOST_HEADS else heads
    first, views = f"L{heads[0].layer}H{heads[0].index}", []
    for example in data.test(task)[:count]:
        inputs = next(engine.answer_batches(model, chosen, [example], 1, answers=False)).inputs
        answer = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        with model.hooks(fwd_hooks=masked):
            answer_masked = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        found = head_attention(model, inputs, looking)
        looks = dict(zip(found.names, found.on_image(), strict=True))
        prompt, right = chosen.target_prompt(example), chosen.answer(example)
        views.append(
            ExampleView(
                image=example.image,
                prompt=prompt,
                target=right,
                answer=str(answer),
                answer_masked=str(answer_masked),
                head=first,
                masked_label=f"{neurons.count()} neurons masked",
                region=inputs.regions[0][0],
                looks=looks,
                lens=logit_lens(model, inputs, k=_LENS_TOKENS),
                image_lens=image_token_lens(model, inputs, model.continuation(prompt, right)[0]),
            )
        )
    return views


def keep_views(
    model: HookedVLM, run: Run, task: str, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> None:
    """Keep what the report draws of examples, and of the way from heads to tokens, if it is not there."""
    if not heads.top():
        return
    flow = find_flow(model, run, task, data, heads, neurons)
    if not run.path("promoted.json").exists():
        save_promoted(model, run, flow)
    if not run.path("examples.json").exists():
        save_examples(run, look_at_examples(model, task, data, heads.top(), neurons))


def find_flow(
    model: HookedVLM, run: Run, task: str, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> HeadNeuronFlow:
    """Which heads feed the neurons, and what these promote, from the folder if it is there."""
    file = run.path("flow.json")
    if not file.exists():
        examples = data.discovery(task)[:_FLOW_EXAMPLES]
        head_neuron_flow(model, task, examples, heads, neurons).save(file)
    return HeadNeuronFlow.load(file)


def save_promoted(model: HookedVLM, run: Run, flow: HeadNeuronFlow, count: int = 5) -> None:
    """Keep the tokens that each task neuron promotes, and its mean activation, in the run folder."""
    places = [(c.layer, c.index) for c in flow.neurons]
    ids = promoted_tokens(model, places, flow.activations, count).ids.tolist()
    rows = [
        [*place, [_readable(model.tokenizer, i) for i in tokens], activation]
        for place, tokens, activation in zip(places, ids, flow.activations.tolist(), strict=True)
    ]
    write_json(run.path("promoted.json"), {"kind": "promoted", "neurons": rows})


def _readable(tokenizer: Any, token_id: int) -> str:
    """A token as text without the space before it; one that is all space, or half a letter, as it is."""
    text = tokenizer.decode([token_id]).strip()
    return text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token_id)


def save_examples(run: Run, views: Sequence[ExampleView]) -> None:
    """Keep example views in the run folder: pictures as PNG, lenses, the rest in examples.json."""
    rows = []
    for i, view in enumerate(views):
        view.image.save(run.path(f"example-{i}.png"))
        texts = {name: getattr(view, name) for name in _EXAMPLE_TEXTS}
        looks = {head: values.tolist() for head, values in view.looks.items()}
        rows.append({**texts, "image": f"example-{i}.png", "looks": looks})
        if view.lens is not None:
            view.lens.save(run.path(f"example-{i}-logit-lens.json"))
        if view.image_lens is not None:
            view.image_lens.save(run.path(f"example-{i}-image-lens.json"))
    write_json(run.path("examples.json"), {"kind": "examples", "examples": rows})
